//! ByT5: tokens are the bytes of UTF-8 plus 3, behind pad 0, end of sequence 1 and unknown 2. The 125 ids behind the
//! bytes are sentinels, `<extra_id_0>` = 259 upwards, as in transformers' ByT5Tokenizer.

use super::{EOS_TOKEN, PAD_TOKEN, UNK_TOKEN};

pub(super) const PAD: u32 = 0;
pub(super) const EOS: u32 = 1;
pub(super) const UNK: u32 = 2;
const BYTE_OFFSET: u32 = 3;
const FIRST_SENTINEL: u32 = BYTE_OFFSET + 256;
pub(super) const SENTINELS: u32 = 125;
pub(super) const VOCAB_SIZE: usize = (FIRST_SENTINEL + SENTINELS) as usize;

pub(super) fn sentinels() -> impl Iterator<Item = u32> {
    FIRST_SENTINEL..FIRST_SENTINEL + SENTINELS
}

/// The tokens of a text, without an end of sequence.
pub(super) fn encode(text: &str) -> Vec<u32> {
    let mut ids = Vec::with_capacity(text.len() + 1);
    let mut rest = text;
    // Where a special token is written out, it is that token.
    while let Some((start, length, id)) = find_special(rest) {
        let (mut before, mut after) = (&rest[..start], &rest[start + length..]);
        if id < BYTE_OFFSET {
            // As in transformers, these three swallow the white space around them; sentinels do not.
            (before, after) = (before.trim_end(), after.trim_start());
        }
        push_bytes(before, &mut ids);
        ids.push(id);
        rest = after;
    }
    push_bytes(rest, &mut ids);
    ids
}

fn push_bytes(text: &str, ids: &mut Vec<u32>) {
    ids.extend(text.bytes().map(|byte| u32::from(byte) + BYTE_OFFSET));
}

/// The first special token in `text`: start, length and id.
fn find_special(text: &str) -> Option<(usize, usize, u32)> {
    text.match_indices('<').find_map(|(start, _)| {
        let (token, _) = text[start..].split_once('>')?;
        let length = token.len() + 1;
        let id = match &text[start..start + length] {
            PAD_TOKEN => PAD,
            EOS_TOKEN => EOS,
            UNK_TOKEN => UNK,
            other => sentinel(other)?,
        };
        Some((start, length, id))
    })
}

fn sentinel(token: &str) -> Option<u32> {
    let digits = token.strip_prefix("<extra_id_")?.strip_suffix('>')?;
    let number: u32 = digits.parse().ok()?;
    // Only the canonical spelling: neither +1 nor 01.
    (number < SENTINELS && number.to_string() == digits).then_some(FIRST_SENTINEL + number)
}

/// The text of tokens; special tokens and broken UTF-8 are left out, as in transformers.
pub(super) fn decode(ids: &[u32]) -> String {
    let bytes: Vec<u8> =
        ids.iter().filter_map(|&id| id.checked_sub(BYTE_OFFSET).and_then(|byte| u8::try_from(byte).ok())).collect();
    bytes.utf8_chunks().map(|chunk| chunk.valid()).collect()
}

/// The text of tokens, sentinels written out.
pub(super) fn decode_all(ids: &[u32]) -> String {
    let is_sentinel = |id: u32| (FIRST_SENTINEL..FIRST_SENTINEL + SENTINELS).contains(&id);
    let runs = ids.chunk_by(|&a, &b| !is_sentinel(a) && !is_sentinel(b));
    let text = |run: &[u32]| match run {
        &[id] if is_sentinel(id) => format!("<extra_id_{}>", id - FIRST_SENTINEL),
        run => decode(run),
    };
    runs.map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected ids are those of transformers 5.23's ByT5Tokenizer, less its end of sequence.
    #[test]
    fn encodes_as_transformers_does() {
        for (text, ids) in [
            ("", &[][..]),
            ("é <extra_id_124>", &[198, 172, 35, 383]),
            ("a <extra_id_0> b", &[100, 35, 259, 35, 101]),
            ("a <extra_id_1>  <extra_id_2> b <s>", &[100, 35, 260, 35, 35, 261, 35, 101, 35, 63, 118, 65]),
            ("<extra_id_3>a", &[262, 100]),
            ("x  </s>  y", &[123, 1, 124]),
            ("<pad>q", &[0, 116]),
            ("a<unk>b", &[100, 2, 101]),
        ] {
            assert_eq!(encode(text), ids, "{text:?}");
        }
    }

    #[test]
    fn near_misses_are_text() {
        for text in ["<", "<<", "<extra_id_125>", "<extra_id_01>", "<extra_id_+1>", "<extra_id_>", "< pad>", "<pad"] {
            assert_eq!(encode(text).len(), text.len(), "{text:?}");
        }
        assert_eq!(encode("<<pad>"), [63, 0]);
    }

    #[test]
    fn decodes_what_it_encodes() {
        for text in ["", "hello", "naïve 日本 🙂\n\t"] {
            assert_eq!(decode(&encode(text)), text);
        }
        // A broken character between two good ones; special tokens; ids beyond the vocabulary.
        assert_eq!(decode(&[107, 198, 2, 108, 259, 258, 1, 0, 384, u32::MAX]), "hi");
    }
}
