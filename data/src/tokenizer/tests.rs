use super::*;

const TEXTS: [&str; 4] = ["b a  b", "c\ta b", "<pad> d é", "zebra </s> c"];

fn from_spec(spec: TokenizerSpec, texts: &[&str], vocab_size: Option<usize>) -> Result<Tokenizer> {
    Tokenizer::from_spec(&spec, texts.iter().map(|&text| text.into()), vocab_size)
}

/// Enough text for the unigram trainer to prune, with characters too rare to be pieces of their own.
fn corpus() -> Vec<String> {
    let mut state = 1;
    let mut pick = |count: usize| {
        state = crate::order::mix(state);
        (state % count as u64) as usize
    };
    let syllables = ["ka", "to", "mi", "ren", "sul", "va", "po", "li", "dor", "ne"];
    let mut texts: Vec<String> = (0..400)
        .map(|_| {
            let words: Vec<String> = (0..8)
                .map(|_| {
                    let length = 1 + pick(4);
                    (0..length).map(|_| syllables[pick(10)]).collect()
                })
                .collect();
            words.join(" ")
        })
        .collect();
    texts.push("xqz xqz xqz xqzw jñjñjñjñ öäüöäüöäü".repeat(3));
    texts
}

fn unigram(vocab_size: usize) -> Tokenizer {
    let corpus = corpus();
    let texts: Vec<&str> = corpus.iter().map(String::as_str).collect();
    from_spec(TokenizerSpec::Unigram, &texts, Some(vocab_size)).unwrap()
}

fn fast(tokenizer: &Tokenizer) -> &Fast {
    match &tokenizer.0 {
        Kind::Fast(fast) => fast,
        Kind::ByT5 => panic!("not a tokenizer.json"),
    }
}

#[test]
fn specs_are_names_or_paths() {
    let base = Path::new("/job");
    assert_eq!(TokenizerSpec::parse("byt5", base), TokenizerSpec::ByT5);
    assert_eq!(TokenizerSpec::parse("wordlevel", base), TokenizerSpec::WordLevel);
    assert_eq!(TokenizerSpec::parse("unigram", base), TokenizerSpec::Unigram);
    assert_eq!(TokenizerSpec::parse("x/tokenizer.json", base), TokenizerSpec::Path("/job/x/tokenizer.json".into()));
    assert!(TokenizerSpec::Unigram.is_trained() && !TokenizerSpec::ByT5.is_trained());
}

#[test]
fn byt5_ends_and_cuts_every_sequence() {
    let tokenizer = from_spec(TokenizerSpec::ByT5, &[], None).unwrap();
    assert_eq!((tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id()), (0, 1, Some(2)));
    assert_eq!(tokenizer.vocab_size(), 384);
    assert_eq!(tokenizer.encode("hi", 9).unwrap(), [107, 108, 1]);
    assert_eq!(tokenizer.encode("hi", 3).unwrap(), [107, 108, 1]);
    assert_eq!(tokenizer.encode("hi", 2).unwrap(), [107, 1]);
    assert_eq!(tokenizer.encode("hi", 1).unwrap(), [1]);
    // As transformers: an end of sequence that is spelled out is not repeated.
    assert_eq!(tokenizer.encode("hi</s>", 9).unwrap(), [107, 108, 1]);
    assert_eq!(tokenizer.decode(&[107, 108, 1]), "hi");
}

#[test]
fn wordlevel_orders_words_by_frequency_then_alphabet() {
    let tokenizer = from_spec(TokenizerSpec::WordLevel, &TEXTS, None).unwrap();
    // b 3, a 2, c 2, then once each; special tokens in the text are not words.
    assert_eq!(tokenizer.vocab_size(), 9);
    assert_eq!(tokenizer.encode("b a c d zebra é", 99).unwrap(), [3, 4, 5, 6, 7, 8, 1]);
    assert_eq!(tokenizer.encode(" b\n\nnew a ", 99).unwrap(), [3, 2, 4, 1]);
    assert_eq!(tokenizer.encode("b a c", 3).unwrap(), [3, 4, 1]);
    assert_eq!(tokenizer.encode("", 3).unwrap(), [1]);
    assert_eq!(tokenizer.decode(&[0, 3, 2, 4, 8, 1, 0]), "b a é");
    assert_eq!((tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id()), (0, 1, Some(2)));
}

#[test]
fn wordlevel_keeps_the_most_frequent_words() {
    let tokenizer = from_spec(TokenizerSpec::WordLevel, &TEXTS, Some(5)).unwrap();
    assert_eq!(tokenizer.vocab_size(), 5);
    assert_eq!(tokenizer.encode("b a c", 99).unwrap(), [3, 4, 2, 1]);
    let error = from_spec(TokenizerSpec::WordLevel, &TEXTS, Some(3)).unwrap_err();
    assert_eq!(error.to_string(), "tokenizer wordlevel: a vocabulary of 3 holds no words; ask for 4 or more");
}

#[test]
fn unigram_is_laid_out_as_t5s() {
    let tokenizer = unigram(250);
    assert_eq!(tokenizer.vocab_size(), 250);
    let ids = tokenizer.encode("<extra_id_0> kato <extra_id_99>", 99).unwrap();
    assert_eq!((ids[0], ids[ids.len() - 2], ids[ids.len() - 1]), (249, 150, 1));
    assert_eq!((tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id()), (0, 1, Some(2)));
    assert_eq!(tokenizer.encode("", 9).unwrap(), [1]);
}

#[test]
fn unigram_decodes_what_it_encodes() {
    let tokenizer = unigram(250);
    for text in corpus() {
        let ids = tokenizer.encode(&text, 1 << 20).unwrap();
        assert!(!ids.contains(&2), "every character of the training texts is known");
        assert!(ids.len() < text.chars().count(), "{text:?} took {} tokens", ids.len());
        assert_eq!(tokenizer.decode(&ids), text);
    }
    let ids = tokenizer.encode("  kato\n\t miren ", 99).unwrap();
    assert_eq!(tokenizer.decode(&ids), "kato miren");
    assert!(tokenizer.encode("ж", 99).unwrap().contains(&2));
    assert_eq!(tokenizer.encode("kato miren vapo", 3).unwrap().len(), 3);
}

#[test]
fn unigram_training_is_deterministic() {
    let mut reversed = corpus();
    reversed.reverse();
    let texts: Vec<&str> = reversed.iter().map(String::as_str).collect();
    let other = from_spec(TokenizerSpec::Unigram, &texts, Some(250)).unwrap();
    assert!(unigram(250).to_json() == other.to_json());
}

#[test]
fn unigram_needs_room_for_every_character() {
    let error = from_spec(TokenizerSpec::Unigram, &["abc", "cd"], Some(100)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tokenizer unigram: a vocabulary of 100 is too small for 5 different characters, 3 special tokens and 100 \
         sentinels; ask for 109 or more"
    );
    assert!(error.is_user_error());
    // The smallest that is allowed works, and little text makes a small vocabulary.
    let smallest = from_spec(TokenizerSpec::Unigram, &["abc", "cd"], Some(109)).unwrap();
    assert!(smallest.vocab_size() <= 109);
    assert_eq!(smallest.decode(&smallest.encode("dcba", 99).unwrap()), "dcba");
    assert!(from_spec(TokenizerSpec::Unigram, &["abc", "cd"], None).unwrap().vocab_size() < 120);
    let error = from_spec(TokenizerSpec::Unigram, &["", " "], None).unwrap_err();
    assert_eq!(error.to_string(), "tokenizer unigram: the training texts hold nothing but white space");
}

#[test]
fn unigram_copes_with_text_without_white_space() {
    let long = "字典学习".repeat(2000);
    let tokenizer = from_spec(TokenizerSpec::Unigram, &[&long], None).unwrap();
    assert_eq!(tokenizer.decode(&tokenizer.encode(&long, 1 << 20).unwrap()), long);
}

#[test]
fn travels_as_one_text() {
    let wordlevel = from_spec(TokenizerSpec::WordLevel, &TEXTS, None).unwrap();
    let byt5 = from_spec(TokenizerSpec::ByT5, &[], None).unwrap();
    for tokenizer in [byt5, wordlevel, unigram(250)] {
        let text = tokenizer.to_json();
        let copy = Tokenizer::from_json(&text).unwrap();
        assert!(copy.to_json() == text, "a copy differs");
        assert_eq!(copy.vocab_size(), tokenizer.vocab_size());
        for text in ["b a c", "kato miren", "<extra_id_7>é"] {
            assert_eq!(copy.encode(text, 99).unwrap(), tokenizer.encode(text, 99).unwrap());
        }
    }
    for text in ["", "{}", "{\"quintet_tokenizer\": \"bert\"}"] {
        let message = Tokenizer::from_json(text).unwrap_err().to_string();
        assert!(message.starts_with("tokenizer (stored): not what Quintet stores: "), "{message}");
    }
}

#[test]
fn a_file_whose_parts_do_not_fit_is_refused() {
    let wordlevel = from_spec(TokenizerSpec::WordLevel, &TEXTS, None).unwrap();
    let mut json: Value = serde_json::from_str(&wordlevel.to_json()).unwrap();
    // The template names a token that is not there; the library finds that out by a panic.
    json["tokenizer"]["post_processor"]["special_tokens"] =
        json!({"</y>": {"id": "</s>", "ids": [0], "tokens": ["</s>"]}});
    let message = Tokenizer::from_json(&json.to_string()).unwrap_err().to_string();
    assert_eq!(message, "tokenizer (stored): not a tokenizer.json: its parts do not fit each other");
}

#[test]
fn opens_what_it_saved() {
    for tokenizer in [
        from_spec(TokenizerSpec::ByT5, &[], None).unwrap(),
        from_spec(TokenizerSpec::WordLevel, &TEXTS, None).unwrap(),
        unigram(250),
    ] {
        let directory = tempfile::tempdir().unwrap();
        tokenizer.save(directory.path()).unwrap();
        assert!(Tokenizer::open(directory.path()).unwrap().to_json() == tokenizer.to_json());
        let file = directory.path().join(TOKENIZER_FILE);
        if file.exists() {
            assert!(Tokenizer::open(&file).unwrap().to_json() == tokenizer.to_json());
        }
        let special: Value = read_json(&directory.path().join(SPECIAL_TOKENS_FILE)).unwrap();
        assert_eq!(special, json!({"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}));
    }
}

/// A WordLevel tokenizer.json with what `change` does to it, in a folder.
fn foreign(change: impl FnOnce(&mut Map<String, Value>), config: Option<Value>) -> tempfile::TempDir {
    let mut json = fast(&from_spec(TokenizerSpec::WordLevel, &TEXTS, None).unwrap()).json.clone();
    change(&mut json);
    let directory = tempfile::tempdir().unwrap();
    write_json(&directory.path().join(TOKENIZER_FILE), &json).unwrap();
    if let Some(config) = config {
        write_json(&directory.path().join(CONFIG_FILE), &config).unwrap();
    }
    directory
}

#[test]
fn a_foreign_file_gets_our_end_of_sequence_and_no_limits() {
    let directory = foreign(
        |json| {
            json["post_processor"] = Value::Null;
            json["truncation"] =
                json!({"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0});
        },
        Some(json!({"tokenizer_class": "T5TokenizerFast", "eos_token": {"content": "b"}, "extra_ids": 0})),
    );
    let tokenizer = Tokenizer::open(directory.path()).unwrap();
    assert_eq!(tokenizer.eos_id(), 3);
    assert_eq!(tokenizer.encode("a c d", 99).unwrap(), [4, 5, 6, 3]);
    let by_itself = fast(&tokenizer).tokenizer.encode("a c d", true).unwrap();
    assert_eq!(by_itself.get_ids(), [4, 5, 6, 3]);
    // Its own configuration is kept.
    let saved = tempfile::tempdir().unwrap();
    tokenizer.save(saved.path()).unwrap();
    let config: Value = read_json(&saved.path().join(CONFIG_FILE)).unwrap();
    assert_eq!(config["tokenizer_class"], "T5TokenizerFast");
}

#[test]
fn unusable_files_say_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let message = |path: &Path| {
        let error = Tokenizer::open(path).unwrap_err();
        assert!(error.is_user_error());
        error.to_string().replace(&path.display().to_string(), "PATH")
    };
    assert!(message(&directory.path().join("x")).starts_with("tokenizer PATH: no such file or folder; give \"byt5\""));
    assert!(message(directory.path()).starts_with("tokenizer PATH: holds neither tokenizer.json nor spiece.model; "));
    fs::write(directory.path().join("spiece.model"), "").unwrap();
    assert!(message(directory.path()).starts_with("tokenizer PATH/spiece.model: a SentencePiece model without pieces"));
    let file = directory.path().join(TOKENIZER_FILE);
    for content in ["{", "[]", "{\"model\": 1}"] {
        fs::write(&file, content).unwrap();
        let message = message(&file);
        assert!(message.starts_with("tokenizer PATH: "), "{message}");
    }
    let no_pad = foreign(|json| json["added_tokens"] = json!([]), Some(json!({"pad_token": "[PAD]"})));
    assert_eq!(
        message(no_pad.path()),
        "tokenizer PATH: has no padding token \"[PAD]\", which T5 needs; name it in tokenizer_config.json"
    );
}

#[test]
fn a_folder_that_cannot_be_written_is_no_user_error() {
    let tokenizer = from_spec(TokenizerSpec::ByT5, &[], None).unwrap();
    assert!(!tokenizer.save(Path::new("/nonexistent/folder")).unwrap_err().is_user_error());
}

#[test]
fn what_fills_the_gaps_of_a_text_is_told_apart() {
    let byt5 = from_spec(TokenizerSpec::ByT5, &[], None).unwrap();
    for tokenizer in [unigram(200), byt5] {
        let mut ids = vec![tokenizer.pad_id()];
        ids.extend(tokenizer.encode("<extra_id_0> kato<extra_id_1> mi", 40).unwrap());
        assert!(!tokenizer.decode(&ids).contains('<'));
        let text = tokenizer.decode_spans(&ids);
        assert_eq!(text.replace(' ', ""), "<extra_id_0>kato<extra_id_1>mi", "{text}");
    }
}
