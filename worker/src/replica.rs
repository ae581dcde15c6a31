//! A rank's copy of the model: weights, gradients, optimizer state, and the arithmetic of a step on them.

use std::path::Path;

use quintet_data::Tokenizer;
use quintet_kernels::{DType, Device, Tensor, View, ViewMut, ops};
use quintet_t5::{Batch, Config, LoraSpec, LossSums, Model, OnFinished, Parameters, TrainOptions, Weights};

use crate::adapter::{Adapter, Base};
use crate::collective::Collective;
use crate::config::{ModelSection, Precision, TrainingConfig};
use crate::optimizer::{ClippedMean, NamedSlot, Optimizer, Piece, ReadSaved};
use crate::scaler::LossScaler;
use crate::schedule::Schedule;
use crate::shards::Shards;
use crate::{Error, Result};

/// The model of a job: that of a directory, or a fresh one.
///
/// # Errors
/// A user error where the files or sizes are wrong, or the tokenizer does not fit the vocabulary.
pub fn load_model(
    device: &Device,
    section: &ModelSection,
    tokenizer: &Tokenizer,
    seed: u64,
) -> Result<(Model, Parameters)> {
    let (mut model, parameters) = match &section.pretrained {
        Some(directory) => quintet_t5::load_pretrained(device, Path::new(directory))?,
        None => fresh_model(device, section, tokenizer, seed)?,
    };
    check_vocabulary(model.config(), tokenizer)?;
    if let Some(rate) = section.dropout_rate {
        model.set_dropout_rate(rate);
    }
    Ok((model, parameters))
}

fn fresh_model(
    device: &Device,
    section: &ModelSection,
    tokenizer: &Tokenizer,
    seed: u64,
) -> Result<(Model, Parameters)> {
    let config = fresh_config(section, tokenizer)?;
    let model = Model::new(device, config)?;
    let mut parameters = model.zero_parameters(DType::F32)?;
    quintet_t5::initialize(model.config(), seed, &mut parameters)?;
    Ok((model, parameters))
}

/// The configuration of fresh weights: the job's keys, and the tokenizer's vocabulary where it names none.
pub fn fresh_config(section: &ModelSection, tokenizer: &Tokenizer) -> Result<Config> {
    let mut keys = section.architecture.clone().unwrap_or_default();
    keys.entry("vocab_size").or_insert(tokenizer.vocab_size().into());
    keys.entry("pad_token_id").or_insert(tokenizer.pad_id().into());
    keys.entry("eos_token_id").or_insert(tokenizer.eos_id().into());
    keys.entry("decoder_start_token_id").or_insert(tokenizer.pad_id().into());
    let config: Config =
        serde_json::from_value(keys.into()).map_err(|error| Error::config("model.architecture", error.to_string()))?;
    if let Some(key) = config.extra.keys().next() {
        let known = serde_json::to_value(Config::default()).unwrap_or_default();
        let known: Vec<&String> = known.as_object().into_iter().flat_map(|known| known.keys()).collect();
        return Err(Error::config("model.architecture", format!("unknown key {key}; known here: {known:?}")));
    }
    config.validate().map_err(|error| Error::config("model.architecture", error.to_string()))?;
    check_vocabulary(&config, tokenizer)?;
    Ok(config)
}

fn check_vocabulary(config: &Config, tokenizer: &Tokenizer) -> Result<()> {
    if tokenizer.vocab_size() > config.vocab_size {
        let problem = format!(
            "has {} tokens, but the model's vocab_size is {}; use the tokenizer that the model was made with",
            tokenizer.vocab_size(),
            config.vocab_size
        );
        return Err(Error::config("model.tokenizer", problem));
    }
    if tokenizer.eos_id() != config.eos_token_id {
        let problem = format!(
            "ends texts with token {}, but the model's eos_token_id is {}",
            tokenizer.eos_id(),
            config.eos_token_id
        );
        return Err(Error::config("model.tokenizer", problem));
    }
    Ok(())
}

/// The weights of a rank and all that updates them.
pub struct Replica {
    model: Model,
    /// f32: what the optimizer updates, digests cover and checkpoints keep. All of the model, or an adapter.
    master: Parameters,
    /// The weights in the type that the model computes in, where that is not f32.
    compute: Option<Parameters>,
    /// The model below an adapter.
    frozen: Option<Frozen>,
    optimizer: Optimizer,
    schedule: Schedule,
    training: TrainingConfig,
    scaling: Option<Scaling>,
    /// The last step whose update is in the weights.
    step: u64,
    /// Whether it is in all of them, and not only in those whose optimizer state is held.
    is_whole: bool,
    /// Whether ranks bring each other the weights that they have updated.
    is_sharded: bool,
}

/// A base that stays as it is: no gradient, no moments, and no copy in f32 but where fp16 needs one.
struct Frozen {
    compute: Parameters,
    master: Option<Parameters>,
    about: AdapterAbout,
}

/// Of an adapter, all but its weights.
#[derive(Clone, Debug)]
pub struct AdapterAbout {
    pub spec: LoraSpec,
    pub base: Base,
}

impl Frozen {
    fn new(base: Parameters, about: AdapterAbout, dtype: DType) -> Result<Self> {
        let (compute, master) = match dtype {
            DType::F32 => (base, None),
            DType::F16 => (base.to_dtype(dtype)?, Some(base)),
            _ => (base.to_dtype(dtype)?, None),
        };
        Ok(Frozen { compute, master, about })
    }

    fn weights(&self) -> Weights<'_> {
        match &self.master {
            Some(master) => Weights::new(&self.compute, master),
            None => Weights::from(&self.compute),
        }
    }
}

/// The loss scaling of fp16.
#[derive(Clone, Copy)]
struct Scaling {
    scaler: LossScaler,
    /// A power of two that no step's number of target tokens exceeds. Torch scales the gradient of the mean over tokens;
    /// ours is of the sum, and is this many times larger at most.
    tokens: f64,
}

impl Scaling {
    /// What the gradient of the sum of losses is multiplied with; a power of two.
    fn gradient_scale(&self) -> f64 {
        self.scaler.scale() / self.tokens
    }
}

/// The digest of a replica whose trained weights have the digest `trained`: of an adapter, with its base's.
pub fn digest_over(trained: blake3::Hash, base_fingerprint: Option<&str>) -> blake3::Hash {
    match base_fingerprint {
        Some(base) => blake3::hash(format!("{} over {base}", trained.to_hex()).as_bytes()),
        None => trained,
    }
}

/// What a step does to the weights when it is committed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Update {
    /// Goes along the clipped mean gradient.
    Apply(ClippedMean),
    /// Nothing: the gradient overflowed under the loss scale, which is too large.
    Skip,
}

impl Replica {
    /// Trains all of `weights`, or an adapter over them. `target_tokens_max` is the most that a step can have. No state of
    /// the optimizer is held yet.
    ///
    /// # Errors
    /// Memory.
    pub fn new(
        model: Model,
        weights: Parameters,
        adapter: Option<Adapter>,
        training: &TrainingConfig,
        precision: Precision,
        total_steps: u64,
        target_tokens_max: u64,
    ) -> Result<Self> {
        if let Device::Gpu(gpu) = model.device() {
            gpu.set_tf32(precision == Precision::Tf32);
        }
        let dtype = precision.dtype();
        let (master, frozen) = match adapter {
            None => (weights, None),
            Some(Adapter { weights: trained, spec, base }) => {
                let about = AdapterAbout { spec, base };
                (trained, Some(Frozen::new(weights, about, dtype)?))
            }
        };
        let compute = match dtype {
            DType::F32 => None,
            dtype => Some(master.to_dtype(dtype)?),
        };
        let scaling = (precision == Precision::Fp16)
            .then(|| Scaling { scaler: LossScaler::default(), tokens: target_tokens_max.next_power_of_two() as f64 });
        let slots = master.layout().tensors().iter().map(NamedSlot::from).collect();
        let optimizer = Optimizer::without_state(model.device(), training.optimizer, training.hyperparameters(), slots);
        let schedule = training.schedule(total_steps);
        let training = training.clone();
        let (step, is_whole, is_sharded) = (0, true, false);
        Ok(Replica {
            model,
            master,
            compute,
            frozen,
            optimizer,
            schedule,
            training,
            scaling,
            step,
            is_whole,
            is_sharded,
        })
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The f32 weights that are trained.
    pub fn master(&self) -> &Parameters {
        &self.master
    }

    /// The weights to compute with.
    pub fn weights(&self) -> Weights<'_> {
        let trained = match &self.compute {
            Some(compute) => Weights::new(compute, &self.master),
            None => Weights::from(&self.master),
        };
        self.frozen.as_ref().map_or(trained, |frozen| trained.over(frozen.weights()))
    }

    /// Of a LoRA run.
    pub fn adapter(&self) -> Option<&AdapterAbout> {
        self.frozen.as_ref().map(|frozen| &frozen.about)
    }

    /// Of fp16.
    pub fn loss_scaler(&self) -> Option<LossScaler> {
        self.scaling.map(|scaling| scaling.scaler)
    }

    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// To say of which weights the state is held.
    pub fn optimizer_mut(&mut self) -> &mut Optimizer {
        &mut self.optimizer
    }

    /// Holds the state of all weights, as the only rank does.
    ///
    /// # Errors
    /// Memory.
    pub fn hold_all(&mut self) -> Result<()> {
        self.optimizer.hold(0..self.master.layout().len())
    }

    /// The last committed step; 0 before the first.
    pub fn step(&self) -> u64 {
        self.step
    }

    pub fn learning_rate(&self, step: u64) -> f64 {
        self.schedule.learning_rate_at(step - 1)
    }

    /// The loss sums of micro-batch `index` of `step`; its gradient, summed over target tokens, is added to `gradient`,
    /// an f32 arena, which comes back in any case.
    pub fn compute(
        &self,
        step: u64,
        index: u32,
        batch: &Batch,
        gradient: Tensor,
        on_finished: OnFinished,
    ) -> (Result<LossSums>, Tensor) {
        let options = TrainOptions {
            seed: step_seed(self.training.seed, step),
            micro_batch: index,
            label_smoothing: self.training.label_smoothing_factor,
            gradient_checkpointing: self.training.gradient_checkpointing,
            gradient_scale: self.scaling.map_or(1.0, |scaling| scaling.gradient_scale() as f32),
        };
        let mut gradients = Parameters::new(self.master.layout().clone(), gradient);
        let sums = self.model.train_observed(self.weights(), batch, options, &mut gradients, on_finished);
        (sums.map_err(Error::from), gradients.into_values())
    }

    /// What a step with a sum of gradients of this norm over its global batch does; nothing good where it is not finite and
    /// no loss scale is to blame.
    pub fn plan_update(&self, norm_of_sum: f64, target_tokens: u64) -> Option<Update> {
        let gradient_scale = self.scaling.map_or(1.0, |scaling| scaling.gradient_scale());
        let divisor = target_tokens as f64 * gradient_scale;
        let mean = ClippedMean::of_norm(norm_of_sum, divisor, self.training.max_grad_norm);
        if mean.norm.is_finite() {
            return Some(Update::Apply(mean));
        }
        self.scaling.filter(|scaling| scaling.scaler.can_shrink()).map(|_| Update::Skip)
    }

    /// Does what was planned for a step that is committed, from the same sum, and counts it. Where the optimizer's state is
    /// sharded, the weights whose state is held are updated, and [`Replica::complete`] is to bring the others.
    pub fn update(&mut self, step: u64, sum: View, update: Update) -> Result<()> {
        assert_eq!(step, self.step + 1, "steps are applied in order");
        assert!(self.is_whole, "weights of another step");
        if let Update::Apply(mean) = update {
            let rate = self.learning_rate(step);
            self.optimizer.step(rate, self.master.view_mut(), sum, mean.scale)?;
            // Who holds everything has to send it all the same.
            self.is_whole = !self.is_sharded;
            if self.is_whole {
                self.refresh_compute()?;
            }
        }
        if let Some(scaling) = &mut self.scaling {
            scaling.scaler.update(update == Update::Skip);
        }
        self.step = step;
        Ok(())
    }

    /// Whether all weights are those of the last step.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Gives up all of the optimizer's state but this rank's part of a division, by which steps go on.
    pub fn divide(&mut self, shards: &Shards, rank: u32) {
        self.optimizer.retain(&shards.parts(rank));
        self.is_sharded = !shards.is_replicated();
    }

    /// Whether nothing of the state has to be had from other ranks.
    pub fn has_everything(&self) -> bool {
        let whole = 0..self.master.layout().len();
        self.is_whole && (self.optimizer.has_origin() || self.optimizer.holds(&whole))
    }

    /// Brings the weights that other ranks have updated from them, after [`Replica::update`].
    ///
    /// # Errors
    /// Those of [`Collective::gather_slices`].
    pub fn complete(&mut self, collective: &mut Collective, shards: &Shards) -> Result<()> {
        if !self.is_whole {
            collective.gather_slices(self.step, shards, self.master.view_mut())?;
            self.is_whole = true;
            self.refresh_compute()?;
        }
        Ok(())
    }

    /// For weights from elsewhere; [`Replica::resume_at`] says when they are whole.
    pub fn master_mut(&mut self) -> ViewMut<'_> {
        self.master.view_mut()
    }

    /// Gives up the state, to be given another.
    pub fn forget(&mut self) {
        self.optimizer.forget();
        self.is_whole = false;
    }

    /// Where the tensors of the weights lie in their arena.
    pub fn pieces(&self) -> Vec<Piece> {
        let tensors = self.master.layout().tensors().iter();
        tensors
            .map(|tensor| Piece {
                name: tensor.name.clone(),
                arena: 0,
                shape: tensor.shape.clone(),
                range: tensor.range.clone(),
            })
            .collect()
    }

    /// Goes on from weights and state that were overwritten with those of `step`, after so many updates.
    pub fn resume_at(&mut self, step: u64, updates: u64, loss_scaler: Option<LossScaler>) -> Result<()> {
        self.optimizer.set_steps(updates);
        if let Some((scaling, scaler)) = self.scaling.as_mut().zip(loss_scaler) {
            scaling.scaler = scaler;
        }
        (self.step, self.is_whole) = (step, true);
        self.refresh_compute()
    }

    /// BLAKE3 of the weights' bytes, an adapter's with its base's: equal on all replicas, or something is broken.
    pub fn digest(&self) -> Result<blake3::Hash> {
        let base_fingerprint = self.adapter().map(|about| about.base.fingerprint.as_str());
        Ok(digest_over(self.master.digest()?, base_fingerprint))
    }

    /// Takes over the weights that `read_weight` fills in, by name and shape, and the optimizer's state where that is.
    pub fn restore(
        &mut self,
        step: u64,
        loss_scaler: Option<LossScaler>,
        mut read_weight: impl FnMut(&str, &[usize], &mut [f32]) -> Result<()>,
        state: ReadSaved,
    ) -> Result<()> {
        read_into(&mut self.master, &mut read_weight)?;
        let updates = step - loss_scaler.map_or(0, |scaler| scaler.skipped_steps());
        self.optimizer.begin_at(updates, state);
        self.resume_at(step, updates, loss_scaler)
    }

    /// Other weights of this model, beside those at hand.
    pub fn read_weights(
        &self,
        mut read_weight: impl FnMut(&str, &[usize], &mut [f32]) -> Result<()>,
    ) -> Result<Parameters> {
        let mut weights = Parameters::zeros(&Device::cpu(), self.master.layout().clone(), DType::F32)?;
        read_into(&mut weights, &mut read_weight)?;
        Ok(weights)
    }

    fn refresh_compute(&mut self) -> Result<()> {
        if let Some(compute) = &mut self.compute {
            ops::cast(self.master.view(), compute.view_mut())?;
        }
        Ok(())
    }
}

impl From<&quintet_t5::NamedTensor> for NamedSlot {
    fn from(tensor: &quintet_t5::NamedTensor) -> Self {
        NamedSlot::new(tensor.name.clone(), tensor.range.start, &tensor.shape)
    }
}

/// Fills an arena tensor by tensor.
fn read_into(
    parameters: &mut Parameters,
    read: &mut impl FnMut(&str, &[usize], &mut [f32]) -> Result<()>,
) -> Result<()> {
    let layout = parameters.layout().clone();
    for tensor in layout.tensors() {
        let mut values = vec![0.0; tensor.range.len()];
        read(&tensor.name, &tensor.shape, &mut values)?;
        parameters.write(tensor.range.clone(), &values)?;
    }
    Ok(())
}

/// One seed a step for dropout: the finaliser of SplitMix64.
fn step_seed(seed: u64, step: u64) -> u64 {
    let mut state = seed.wrapping_add(step.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    state = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    state ^ (state >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: u64 = 12;

    fn replica(precision: Precision) -> Replica {
        let config =
            Config { vocab_size: 20, d_model: 8, d_kv: 4, d_ff: 12, num_heads: 2, num_layers: 1, ..Config::default() };
        let model = Model::new(&Device::cpu(), config).unwrap();
        let mut master = model.zero_parameters(DType::F32).unwrap();
        quintet_t5::initialize(model.config(), 1, &mut master).unwrap();
        let mut replica = Replica::new(model, master, None, &TrainingConfig::default(), precision, 10, TOKENS).unwrap();
        replica.hold_all().unwrap();
        replica
    }

    /// The gradient of a batch of twelve target tokens.
    fn gradient(replica: &Replica, step: u64) -> Tensor {
        let (source, target): (Vec<u32>, Vec<u32>) = ((2..12).collect(), (3..15).collect());
        let batch = Batch::new(replica.model().device(), &source, &[0, 4, 10], &target, &[0, 5, 12], 0).unwrap();
        let zeros = replica.model().zero_parameters(DType::F32).unwrap().into_values();
        let (sums, gradient) = replica.compute(step, 0, &batch, zeros, &mut |_, _| {});
        let sums = sums.unwrap();
        assert_eq!(sums.target_tokens, TOKENS);
        gradient
    }

    fn plan(replica: &Replica, sum: &Tensor) -> Option<Update> {
        replica.plan_update(ops::global_norm(sum.view()).unwrap(), TOKENS)
    }

    #[test]
    fn the_loss_scale_cancels() {
        let norm = |precision| {
            let replica = replica(precision);
            match plan(&replica, &gradient(&replica, 1)) {
                Some(Update::Apply(mean)) => mean.norm,
                other => panic!("{other:?}"),
            }
        };
        let (exact, rounded) = (norm(Precision::Fp32), norm(Precision::Fp16));
        assert!((rounded / exact - 1.0).abs() < 5e-3, "{rounded} and {exact}");
        assert_ne!(rounded, exact);
    }

    #[test]
    fn an_overflowing_step_changes_nothing_but_the_scale() {
        let mut replica = replica(Precision::Fp16);
        let mut sum = gradient(&replica, 1);
        sum.as_mut_slice::<f32>()[5] = f32::INFINITY;
        let digest = replica.digest().unwrap();
        assert_eq!(plan(&replica, &sum), Some(Update::Skip));
        replica.update(1, sum.view(), Update::Skip).unwrap();
        assert_eq!((replica.digest().unwrap(), replica.step(), replica.optimizer().steps()), (digest, 1, 0));
        assert_eq!(replica.loss_scaler().unwrap().scale(), 32768.0);
        let sum = gradient(&replica, 2);
        let update = plan(&replica, &sum).unwrap();
        assert!(matches!(update, Update::Apply(_)));
        replica.update(2, sum.view(), update).unwrap();
        assert_ne!(replica.digest().unwrap(), digest);
        assert_eq!((replica.step(), replica.optimizer().steps()), (2, 1));
    }

    #[test]
    fn without_a_loss_scale_what_is_not_finite_is_refused() {
        for precision in [Precision::Fp32, Precision::Bf16] {
            let replica = replica(precision);
            let mut sum = gradient(&replica, 1);
            sum.as_mut_slice::<f32>()[5] = f32::NAN;
            assert_eq!(plan(&replica, &sum), None);
        }
    }
}
