//! Examples that are on another machine: what that tells of them, and how some are got and checked.
//!
//! A machine that has the files keeps rendered texts in stores, whose digests make up the fingerprint of the data. One that
//! has none is told every store's size and root ([`StoreAbout`]), from which the same fingerprint follows, and asks for
//! leaves as it needs them. Whatever it gets is checked against the root before it is used, so that the fingerprint stands
//! for the texts of both.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, OnceLock};

use crate::error::{Error, Result};
use crate::store::Store;
use crate::tree::{self, LEAF_ITEMS, Tree};

/// Leaves to ask for at a time.
pub const LEAVES_MAX: usize = 1024;

/// What identifies the items of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreAbout {
    /// Their number.
    pub items: u64,
    /// The root of the tree over them.
    pub root: [u8; 32],
}

/// Some consecutive items of a store, and what proves that they are its.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    /// The items.
    pub items: Vec<Vec<u8>>,
    /// The hashes beside the way from the leaf to the root, from below.
    pub proof: Vec<[u8; 32]>,
}

/// A machine that has the data.
pub trait Origin: fmt::Debug + Send + Sync {
    /// Leaves of a store, in the order of `numbers`, of which there are at most [`LEAVES_MAX`]. Waits for them.
    ///
    /// # Errors
    /// [`Error::Origin`].
    fn leaves(&self, store: u32, numbers: &[u64]) -> Result<Vec<Leaf>>;
}

/// What can be read of an [`Origin`].
#[derive(Clone, Debug)]
pub struct Catalogue {
    /// Its stores: of every source in the order of the job, that of the training examples, and that of the examples to
    /// validate with where these are files of their own.
    pub stores: Vec<StoreAbout>,
    /// Who has them.
    pub origin: Arc<dyn Origin>,
}

/// A store on another machine.
#[derive(Clone, Debug)]
pub(crate) struct Remote {
    about: StoreAbout,
    number: u32,
    origin: Arc<dyn Origin>,
}

impl Remote {
    pub(crate) fn about(&self) -> StoreAbout {
        self.about
    }

    /// Gets items, with those that share a leaf with them.
    pub(crate) fn fetch(&self, items: impl Iterator<Item = u64>) -> Result<Fetched> {
        let numbers: BTreeSet<u64> = items.map(|item| item / LEAF_ITEMS).collect();
        let numbers: Vec<u64> = numbers.into_iter().collect();
        let mut fetched = HashMap::with_capacity(numbers.len());
        for numbers in numbers.chunks(LEAVES_MAX) {
            let leaves = self.origin.leaves(self.number, numbers)?;
            if leaves.len() != numbers.len() {
                return Err(Error::origin("answered with another number of examples than it was asked for"));
            }
            for (&number, leaf) in numbers.iter().zip(leaves) {
                self.check(number, &leaf)?;
                fetched.insert(number, leaf.items);
            }
        }
        Ok(Fetched { leaves: fetched })
    }

    fn check(&self, number: u64, leaf: &Leaf) -> Result<()> {
        let hash = tree::leaf(leaf.items.iter().map(Vec::as_slice));
        let proof: Vec<blake3::Hash> = leaf.proof.iter().map(|&hash| hash.into()).collect();
        match tree::holds(&self.about.root.into(), tree::leaves_of(self.about.items), number, hash, &proof) {
            true => Ok(()),
            false => Err(Error::origin("sent examples that are not those of the run's fingerprint")),
        }
    }
}

/// Leaves that were got.
#[derive(Debug)]
pub(crate) struct Fetched {
    leaves: HashMap<u64, Vec<Vec<u8>>>,
}

impl Fetched {
    /// # Panics
    /// When it was not asked for.
    pub(crate) fn item(&self, index: u64) -> &[u8] {
        let leaf = self.leaves.get(&(index / LEAF_ITEMS)).and_then(|leaf| leaf.get((index % LEAF_ITEMS) as usize));
        leaf.unwrap_or_else(|| panic!("item {index} was not gathered"))
    }
}

/// The stores of a catalogue, one after the other.
pub(crate) struct Shelves<'a> {
    catalogue: &'a Catalogue,
    next: u32,
}

impl<'a> Shelves<'a> {
    pub(crate) fn new(catalogue: &'a Catalogue) -> Self {
        Self { catalogue, next: 0 }
    }

    pub(crate) fn next(&mut self) -> Result<Store> {
        let number = self.next;
        let about = self.catalogue.stores.get(number as usize).copied();
        let about = about.ok_or_else(|| Error::origin("has data of another job"))?;
        self.next += 1;
        Ok(Store::remote(Remote { about, number, origin: Arc::clone(&self.catalogue.origin) }))
    }
}

/// The stores of a run's data, for machines that have none.
#[derive(Clone, Debug, Default)]
pub struct Shelf {
    stores: Vec<(Arc<Store>, Arc<OnceLock<Tree>>)>,
}

impl Shelf {
    pub(crate) fn new(stores: Vec<Arc<Store>>) -> Self {
        Self { stores: stores.into_iter().map(|store| (store, Arc::default())).collect() }
    }

    /// Of every store, as in [`Catalogue::stores`].
    pub fn stores(&self) -> Vec<StoreAbout> {
        self.stores.iter().map(|(store, _)| store.about()).collect()
    }

    /// A leaf of a store with its proof; `None` where there is none of this number. The first of a store reads all of it.
    pub fn leaf(&self, store: u32, number: u64) -> Option<Leaf> {
        let (store, tree) = self.stores.get(store as usize)?;
        let leaves = tree::leaves_of(store.len());
        if number >= leaves {
            return None;
        }
        let items = |number: u64| {
            let first = number * LEAF_ITEMS;
            (first..store.len().min(first + LEAF_ITEMS)).map(|item| store.item(item))
        };
        let hash = |number| tree::leaf(items(number));
        let tree = tree.get_or_init(|| Tree::new(leaves, hash));
        let proof = tree.proof(number, hash);
        Some(Leaf {
            items: items(number).map(<[u8]>::to_vec).collect(),
            proof: proof.iter().map(|hash| *hash.as_bytes()).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::config::DataConfig;
    use crate::load::Splits;
    use crate::loader::Packer;
    use crate::tokenizer::{Tokenizer, TokenizerSpec};

    /// A shelf that is asked directly, and may lie.
    #[derive(Debug)]
    struct Direct {
        shelf: Shelf,
        spoil: fn(&mut Vec<Leaf>),
    }

    impl Origin for Direct {
        fn leaves(&self, store: u32, numbers: &[u64]) -> Result<Vec<Leaf>> {
            assert!(numbers.len() <= LEAVES_MAX);
            let mut leaves = numbers.iter().map(|&number| self.shelf.leaf(store, number).unwrap()).collect();
            (self.spoil)(&mut leaves);
            Ok(leaves)
        }
    }

    fn config(settings: &str) -> DataConfig {
        toml::from_str(&format!("input = \"in {{x}}\"\n{settings}")).unwrap()
    }

    fn write(directory: &Path) {
        for (name, count) in [("a", 300), ("b", 50), ("v", 20)] {
            let rows = (0..count).map(|row| format!("{{\"x\": \"{name} {row}\", \"y\": \"class {}\"}}\n", row % 3));
            fs::write(directory.join(name).with_extension("jsonl"), rows.collect::<String>()).unwrap();
        }
    }

    fn catalogue(splits: &Splits, spoil: fn(&mut Vec<Leaf>)) -> Catalogue {
        let shelf = splits.shelf();
        Catalogue { stores: shelf.stores(), origin: Arc::new(Direct { shelf, spoil }) }
    }

    #[test]
    fn fetched_examples_are_the_same_whatever_is_made_of_them() {
        let (here, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(here.path());
        let mixture =
            "[[mixture]]\nname = \"a\"\ntrain = \"a.jsonl\"\n[[mixture]]\nname = \"b\"\ntrain = \"b.jsonl\"\n";
        for settings in [
            "train = \"a.jsonl\"\ntarget = \"{y}\"".to_owned(),
            "train = \"a.jsonl\"\nvalidation = \"v.jsonl\"\ntarget = \"{y}\"".to_owned(),
            "train = \"a.jsonl\"\nvalidation_split = 0.1\nsample = 100\ntarget = \"{y}\"".to_owned(),
            "train = \"a.jsonl\"\nvalidation_split = 0.1\nstratify_by = \"y\"\ntarget = \"{y}\"".to_owned(),
            "train = \"a.jsonl\"\nvalidation = \"v.jsonl\"\nnum_shots = 2\ntarget = \"{y}\"".to_owned(),
            "train = \"a.jsonl\"\nobjective = \"span_corruption\"\nmax_source_length = 32".to_owned(),
            format!("target = \"{{y}}\"\nvalidation_split = 0.2\n{mixture}"),
            format!("target = \"{{y}}\"\n{mixture}validation = \"v.jsonl\"\n"),
        ] {
            let config = config(&settings);
            let tokenizer = Arc::new(Tokenizer::from_spec(&TokenizerSpec::ByT5, [].into_iter(), None).unwrap());
            let local = Splits::load(&config, here.path(), 7).unwrap();
            let catalogue = catalogue(&local, |_| {});
            let fetched = Splits::fetched(&config, elsewhere.path(), 7, &catalogue, false).unwrap();
            assert_eq!(fetched.fingerprint(), local.fingerprint(), "{settings}");
            let [local, fetched] = [local, fetched].map(|splits| splits.tokenized(&tokenizer).unwrap());
            assert_eq!(fetched.order(), local.order());
            let pack = |splits: &Splits| {
                let packer =
                    Packer::new(Arc::new(splits.train.clone()), tokenizer.clone(), splits.order(), config.limits());
                packer.pack(3, 0..local.order().positions().min(40)).unwrap()
            };
            assert_eq!(pack(&fetched), pack(&local), "{settings}");
            let validation = |splits: Splits| {
                splits
                    .validation
                    .iter()
                    .flat_map(|v| v.examples().map(|e| e.input.into_owned()).collect::<Vec<_>>())
                    .collect::<Vec<_>>()
            };
            assert_eq!(validation(fetched), validation(local), "{settings}");
        }
    }

    #[test]
    fn what_is_not_of_the_fingerprint_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path());
        let config = config("train = \"a.jsonl\"\ntarget = \"{y}\"");
        let local = Splits::load(&config, directory.path(), 7).unwrap();
        let tokenizer = Arc::new(Tokenizer::from_spec(&TokenizerSpec::ByT5, [].into_iter(), None).unwrap());
        let spoils: [fn(&mut Vec<Leaf>); 6] = [
            |leaves| leaves[0].items[3].push(b'!'),
            |leaves| leaves[0].items.swap(0, 2),
            |leaves| drop(leaves[0].items.pop()),
            |leaves| leaves[0].proof[0][5] ^= 1,
            |leaves| leaves.reverse(),
            |leaves| drop(leaves.pop()),
        ];
        for (number, spoil) in spoils.into_iter().enumerate() {
            let fetched = Splits::fetched(&config, directory.path(), 7, &catalogue(&local, spoil), false).unwrap();
            let packer =
                Packer::new(Arc::new(fetched.train.clone()), tokenizer.clone(), fetched.order(), config.limits());
            let error = packer.pack(0, 0..20).unwrap_err();
            assert!(matches!(error, Error::Origin { is_lost: false, .. }), "{number}: {error}");
        }
        // Of a job with another number of sources.
        let few = Catalogue { stores: Vec::new(), ..catalogue(&local, |_| {}) };
        assert!(Splits::fetched(&config, directory.path(), 7, &few, false).is_err());
    }
}
