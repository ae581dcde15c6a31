//! What stands in front of an example's input: a fixed text, and other examples to learn from (few-shot prompts).

use crate::config::DataConfig;
use crate::dataset::Texts;
use crate::error::{Error, Result};
use crate::order::{Order, mix};
use crate::source::Record;
use crate::template::Template;

/// Keeps the choice of shots apart from the order's and the split's, which mix the same seed.
const SHOT_SALT: u64 = 0x7368_6f74_735f_6b65;

/// Builds inputs.
#[derive(Clone, Debug)]
pub(crate) struct Prompt {
    prefix: String,
    shots: Option<Shots>,
}

#[derive(Clone, Debug)]
struct Shots {
    count: usize,
    template: Template,
    /// Whose examples they are.
    from: Texts,
    /// Whether the prompt's own examples are those, so that one may meet itself.
    from_own: bool,
    seed: u64,
}

impl Prompt {
    /// The prompt of a job; none if its inputs stand alone. Shots are taken `from` the training examples.
    ///
    /// # Errors
    /// A template that does not parse, or fewer examples than shots.
    pub(crate) fn new(config: &DataConfig, from: &Texts, from_own: bool, seed: u64) -> Result<Option<Self>> {
        let shots = match config.num_shots {
            0 => None,
            count => {
                let others = from.len() - u64::from(from_own);
                if others < count as u64 {
                    let message = format!("{count} is more than the {others} other training examples");
                    return Err(Error::setting("data.num_shots", message));
                }
                Some(Shots { count, template: config.shot_template()?, from: from.clone(), from_own, seed })
            }
        };
        let prefix = config.source_prefix.clone();
        Ok((shots.is_some() || !prefix.is_empty()).then_some(Self { prefix, shots }))
    }

    /// The input of example `index` with all that stands before it: its own shots, the same whenever it is asked for.
    pub(crate) fn render(&self, index: u64, input: &str) -> String {
        self.pieces(index, input).concat()
    }

    /// The parts of the prompt: the prefix, each shot, the input.
    pub(crate) fn pieces(&self, index: u64, input: &str) -> Vec<String> {
        let mut pieces = vec![self.prefix.clone()];
        if let Some(shots) = &self.shots {
            pieces.extend(shots.chosen(index, input).map(|shot| shots.render(shot)));
        }
        pieces.push(input.to_owned());
        pieces
    }

    /// Text that the prompt adds, for a vocabulary to know it.
    pub(crate) fn literals(&self) -> Vec<String> {
        let shots = self.shots.iter().map(|shots| shots.template.render_with("", ""));
        std::iter::once(self.prefix.clone()).chain(shots).collect()
    }

    /// What decides which text it makes.
    pub(crate) fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        let shots = self.shots.as_ref().map(|shots| {
            (
                shots.count,
                shots.template.render_with("\0i", "\0t"),
                shots.from.digest().to_hex(),
                shots.from_own,
                shots.seed,
            )
        });
        hasher.update(format!("{:?} {shots:?}", self.prefix).as_bytes());
        hasher.finalize()
    }
}

impl Shots {
    /// Distinct examples in random order, none with this very input.
    fn chosen(&self, index: u64, input: &str) -> impl Iterator<Item = u64> {
        let key = mix(mix(self.seed ^ SHOT_SALT).wrapping_add(index)) ^ u64::from(self.from_own);
        let order = Order::new(self.from.len(), key, true);
        let candidates = (0..self.from.len()).map(move |position| order.example(0, position));
        let others =
            candidates.filter(move |&shot| !(self.from_own && shot == index) && self.from.input(shot) != input);
        others.take(self.count)
    }

    fn render(&self, shot: u64) -> String {
        self.template.render_with(&self.from.input(shot), &self.from.target(shot))
    }
}

impl Template {
    /// Of a template over `input` and `target`.
    fn render_with(&self, input: &str, target: &str) -> String {
        let mut text = String::new();
        let record = Record::from_texts([("input", input), ("target", target)]);
        // It was checked to have no other fields.
        let _ = self.render(&record, &mut text);
        text
    }
}
