//! The command line.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use quintet_t5::EarlyStopping;

pub(crate) use crate::launch_args::{HostArguments, LaunchArguments};

/// Trains T5 models, on one core or a cluster.
#[derive(Parser)]
#[command(name = "quintet", version)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Train on this machine: a coordinator and worker processes.
    Train(TrainArguments),
    /// Train on many machines, by the engine that they are run with.
    Launch(LaunchArguments),
    /// The half of a run that schedules; prints the URL that workers join.
    Coordinator(CoordinatorArguments),
    /// The half of a run that computes.
    Worker(WorkerArguments),
    /// Join tokens for a run that listens beyond this machine, one a line.
    Tokens(TokensArguments),
    /// Loss and metrics of a model on a file, or of predictions.
    Evaluate(Box<EvaluateArguments>),
    /// Text out of a model.
    Generate(GenerateArguments),
    /// A job file from the arguments of a Hugging Face training.
    ImportArgs(ImportArguments),
    /// Texts as vectors: the means of an encoder's last hidden states.
    Embed(EmbedArguments),
    /// A model with an adapter folded into it, as a model directory.
    Merge(MergeArguments),
    /// Look at a data source, or write a built-in one as JSON lines.
    Data(DataArguments),
    /// Measure.
    Bench(BenchArguments),
    /// Every kernel against a float64 oracle, then training steps against stored references.
    Selftest(SelftestArguments),
    /// What this machine has, and what to do about what is missing.
    Doctor(DoctorArguments),
}

/// Where to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeviceChoice {
    /// A GPU where there is one that can be used, else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
    /// The GPU's kernels on the processor: slow, for tests.
    Emulated,
}

impl DeviceChoice {
    /// As the flag takes it.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    }
}

/// A job file, and what the command line changes in it.
#[derive(Args, Clone, Default)]
pub(crate) struct JobArguments {
    /// The job file.
    pub(crate) job: PathBuf,
    /// Write the run here instead of the job's output_dir.
    #[arg(long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    /// Continue from the newest checkpoint in the output directory.
    #[arg(long)]
    pub(crate) resume: bool,
    /// Override a value of the job file; may be given several times.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
    /// Number of worker processes.
    #[arg(long, value_name = "N")]
    pub(crate) workers: Option<u32>,
    #[arg(long, value_enum)]
    pub(crate) device: Option<DeviceChoice>,
}

impl JobArguments {
    /// For commands that read a job without running it.
    pub(crate) fn new(job: &Path, overrides: Vec<String>) -> Self {
        JobArguments { job: job.to_path_buf(), output: None, resume: false, overrides, workers: None, device: None }
    }

    /// The same on another command line; without `--resume`, `--workers` and `--device`.
    pub(crate) fn words(&self) -> Vec<String> {
        let mut words = vec![self.job.display().to_string()];
        if let Some(output) = &self.output {
            words.extend(["--output".to_string(), output.display().to_string()]);
        }
        words.extend(self.overrides.iter().flat_map(|assignment| ["--set".to_string(), assignment.clone()]));
        words
    }
}

#[derive(Args)]
pub(crate) struct TrainArguments {
    #[command(flatten)]
    pub(crate) job: JobArguments,
    /// Print the result as one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct CoordinatorArguments {
    #[command(flatten)]
    pub(crate) job: JobArguments,
    /// Where workers reach this coordinator.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Option<SocketAddr>,
    /// Directory of the run's certificate authority; by default "security" in the output directory. Made where there is
    /// none.
    #[arg(long, value_name = "DIR", conflicts_with = "insecure_plaintext")]
    pub(crate) authority: Option<PathBuf>,
    /// Allow plain text beyond this machine: anyone on the network can then read and join the run.
    #[arg(long)]
    pub(crate) insecure_plaintext: bool,
    /// Print the result as one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Default)]
pub(crate) struct WorkerArguments {
    /// The URL that the coordinator printed; else QUINTET_COORDINATOR, or MASTER_ADDR and MASTER_PORT. For https, a join
    /// token is read from QUINTET_JOIN_TOKEN or from the file that QUINTET_JOIN_TOKEN_FILE names, one a line; for http, the
    /// run's token from QUINTET_RUN_TOKEN.
    #[arg(long, value_name = "URL")]
    pub(crate) coordinator: Option<String>,
    /// Join by the file that a launcher wrote; "-" reads it from standard input, and ends when that does.
    #[arg(long, value_name = "FILE", conflicts_with = "coordinator")]
    pub(crate) join: Option<PathBuf>,
    /// Where other workers reach this one; by default on the address from which it reaches the coordinator.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Option<SocketAddr>,
    /// The line of the file of join tokens to begin with, from 0; RANK by default. Lines that were used are passed over.
    #[arg(long, value_name = "N")]
    pub(crate) token_index: Option<usize>,
    /// Wait so long for a coordinator that is not there yet.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) wait_seconds: u32,
    /// Start so many workers here, which share the cores and take a GPU each, and others in place of those that die.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) nproc_per_node: Option<u32>,
    /// Where to compute; what the job says by default.
    #[arg(long, value_enum)]
    pub(crate) device: Option<DeviceChoice>,
    /// Which of this machine's GPUs to compute on, where it is GPUs; LOCAL_RANK by default.
    #[arg(long, value_name = "N")]
    pub(crate) gpu: Option<usize>,
    /// Threads to compute with; by default this worker's share of the cores, which is all without LOCAL_WORLD_SIZE.
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Allow plain text beyond this machine.
    #[arg(long)]
    pub(crate) insecure_plaintext: bool,
    /// Started by `quintet train`, which tells how the run ended.
    #[arg(long, hide = true)]
    pub(crate) supervised: bool,
}

#[derive(Args)]
pub(crate) struct TokensArguments {
    /// Directory of the run's certificate authority: "security" in its output directory. Made where there is none.
    pub(crate) authority: PathBuf,
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) count: u32,
    /// How long they are good.
    #[arg(long, value_name = "HOURS", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=87_600))]
    pub(crate) hours: u32,
}

#[derive(Args)]
pub(crate) struct EvaluateArguments {
    /// A model directory in Hugging Face's layout, a repository of the hub, or an adapter that names its model.
    #[arg(long, value_name = "DIR", required_unless_present_any = ["predictions", "compare"])]
    pub(crate) model: Option<PathBuf>,
    /// An adapter of that model, in PEFT's layout.
    #[arg(long, value_name = "DIR", requires = "model")]
    pub(crate) adapter: Option<PathBuf>,
    /// Evaluate on what this job file holds out, as the job does: its templates, prompts, filters and evaluation.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = [
            "data", "input", "target", "metrics", "batch_size", "max_source_length", "max_target_length",
            "max_examples", "toxicity_model", "GenerationFlags", "predictions", "compare",
        ],
    )]
    pub(crate) job: Option<PathBuf>,
    /// Override a value of the job file; may be given several times.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE", requires = "job")]
    pub(crate) overrides: Vec<String>,
    /// Write predictions.jsonl there, for `--compare`.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["predictions", "compare"])]
    pub(crate) output: Option<PathBuf>,
    /// The examples.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["predictions", "compare", "job"])]
    pub(crate) data: Option<String>,
    /// Template of the input over a record's fields.
    #[arg(long, value_name = "TEMPLATE", required_unless_present_any = ["predictions", "compare", "job"])]
    pub(crate) input: Option<String>,
    /// Template of the target.
    #[arg(long, value_name = "TEMPLATE", required_unless_present_any = ["predictions", "compare", "job"])]
    pub(crate) target: Option<String>,
    /// Only records that fulfil this, as data.where of a job.
    #[arg(long = "where", value_name = "CONDITION", requires = "data")]
    pub(crate) condition: Option<String>,
    /// Score lines of {"prediction", "target"} without a model.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "data", "input", "target"])]
    pub(crate) predictions: Option<PathBuf>,
    /// Scores of several files of predictions, or directories of runs, side by side and against the first.
    #[arg(long, value_name = "RUN", num_args = 1.., conflicts_with_all = ["model", "data", "input", "target", "predictions"])]
    pub(crate) compare: Vec<PathBuf>,
    /// A tokenizer other than the model's.
    #[arg(long)]
    pub(crate) tokenizer: Option<String>,
    /// The classifier that the score toxicity is measured by, a directory or a repository of the hub.
    #[arg(long, value_name = "DIR", conflicts_with = "compare")]
    pub(crate) toxicity_model: Option<String>,
    /// Its class of toxic texts; "toxic" by default.
    #[arg(long, value_name = "CLASS", requires = "toxicity_model")]
    pub(crate) toxic_label: Option<String>,
    /// Names of scores, as in job files; loss and exact_match by default, of a classifier loss and accuracy.
    #[arg(long, value_delimiter = ',')]
    pub(crate) metrics: Vec<String>,
    #[arg(long, default_value_t = 32)]
    pub(crate) batch_size: u32,
    #[arg(long, default_value_t = 512)]
    pub(crate) max_source_length: usize,
    #[arg(long, default_value_t = 128)]
    pub(crate) max_target_length: usize,
    #[command(flatten)]
    pub(crate) generation: GenerationFlags,
    /// Only the first so many examples.
    #[arg(long)]
    pub(crate) max_examples: Option<u64>,
    #[arg(long, value_enum, default_value_t)]
    pub(crate) device: DeviceChoice,
    /// Print the result as one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A model with its tokenizer.
#[derive(Args)]
pub(crate) struct ModelArguments {
    /// A model directory in Hugging Face's layout, a repository of the hub, or an adapter that names its model.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// An adapter of that model, in PEFT's layout.
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Option<PathBuf>,
    /// A tokenizer other than the model's.
    #[arg(long)]
    pub(crate) tokenizer: Option<String>,
}

/// What a model is given.
#[derive(Args)]
pub(crate) struct InputArguments {
    #[arg(long, required_unless_present = "input_file")]
    pub(crate) input: Option<String>,
    /// One input a line.
    #[arg(long, value_name = "FILE", conflicts_with = "input")]
    pub(crate) input_file: Option<PathBuf>,
    /// Longer inputs are cut.
    #[arg(long, default_value_t = 512)]
    pub(crate) max_source_length: usize,
}

#[derive(Args)]
pub(crate) struct GenerateArguments {
    #[command(flatten)]
    pub(crate) model: ModelArguments,
    #[command(flatten)]
    pub(crate) inputs: InputArguments,
    #[command(flatten)]
    pub(crate) generation: GenerationFlags,
    /// Outputs for each input: of beams or samples.
    #[arg(long, value_name = "N")]
    pub(crate) num_return_sequences: Option<usize>,
    /// Score this text instead of generating, by its log probability given the input; may be given several times.
    #[arg(long, value_name = "TEXT", conflicts_with = "stream")]
    pub(crate) candidates: Vec<String>,
    /// Inputs generated at a time; inputs of similar length are put together.
    #[arg(long, default_value_t = 32)]
    pub(crate) batch_size: usize,
    /// Print as it comes: of one input the text token by token, of several each line when its batch is done.
    #[arg(long)]
    pub(crate) stream: bool,
    #[arg(long, value_enum, default_value_t)]
    pub(crate) device: DeviceChoice,
    /// Print one JSON object an input.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How to generate; what is left open, the model's generation_config.json may say.
#[derive(Args, Clone)]
pub(crate) struct GenerationFlags {
    #[arg(long, value_name = "N")]
    pub(crate) max_new_tokens: Option<usize>,
    #[arg(long, value_name = "N")]
    pub(crate) min_new_tokens: Option<usize>,
    /// Hypotheses of a beam search; 1 is greedy search, or sampling.
    #[arg(long, value_name = "N")]
    pub(crate) num_beams: Option<usize>,
    /// Beams are compared by the sum of log probabilities, divided by the length to the power of this.
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub(crate) length_penalty: Option<f64>,
    /// When a beam search ends: false, true or never, as in transformers.
    #[arg(long, value_name = "WHEN")]
    pub(crate) early_stopping: Option<EarlyStopping>,
    /// No sequence of so many tokens twice.
    #[arg(long, value_name = "N")]
    pub(crate) no_repeat_ngram_size: Option<usize>,
    /// Above 1 makes tokens that were there less probable.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) repetition_penalty: Option<f32>,
    /// Draw tokens instead of taking the most probable.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub(crate) do_sample: Option<bool>,
    #[arg(long, value_name = "NUMBER")]
    pub(crate) temperature: Option<f32>,
    /// Draw among so many most probable tokens; 0: among all.
    #[arg(long, value_name = "N")]
    pub(crate) top_k: Option<usize>,
    /// Draw among the fewest tokens that are this probable together.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) top_p: Option<f64>,
    /// Of sampling.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
}

#[derive(Args)]
pub(crate) struct ImportArguments {
    /// TrainingArguments (of to_dict), a LoraConfig (adapter_config.json) or a GenerationConfig, as JSON.
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Print the job and what was not converted as one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct EmbedArguments {
    #[command(flatten)]
    pub(crate) model: ModelArguments,
    #[command(flatten)]
    pub(crate) inputs: InputArguments,
    /// Inputs computed at a time.
    #[arg(long, default_value_t = 32)]
    pub(crate) batch_size: usize,
    #[arg(long, value_enum, default_value_t)]
    pub(crate) device: DeviceChoice,
    /// Print one JSON object an input, instead of numbers between tabs.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct MergeArguments {
    #[command(flatten)]
    pub(crate) model: ModelArguments,
    /// Keep the encoder alone, as transformers' T5EncoderModel.
    #[arg(long)]
    pub(crate) encoder_only: bool,
    /// The new model directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) output: PathBuf,
}

#[derive(Args)]
pub(crate) struct DataArguments {
    #[command(subcommand)]
    pub(crate) command: DataCommand,
}

#[derive(Subcommand)]
pub(crate) enum DataCommand {
    /// The first records of a source and their number; or the first examples of a job, what its filters left out, the
    /// shares of its mixture, and lengths in tokens.
    Inspect {
        #[command(flatten)]
        job: DataJobArguments,
        #[arg(long, default_value_t = 3)]
        records: usize,
    },
    /// Tokenize a job's examples ahead; training on the same data then reads the tokens.
    Prepare {
        #[command(flatten)]
        job: DataJobArguments,
        /// Print the result as one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Write a source as JSON lines.
    Export {
        /// A file, a glob, a folder of a data set, or "builtin:cmudict".
        source: String,
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
    },
}

/// A job file of which only the data matters.
#[derive(Args)]
pub(crate) struct DataJobArguments {
    /// The job file; to inspect also a file, a glob, a folder of a data set, or "builtin:cmudict".
    pub(crate) job: PathBuf,
    /// The run's folder, instead of the job's output_dir.
    #[arg(long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    /// Override a value of the job file; may be given several times.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
}

impl DataJobArguments {
    pub(crate) fn as_job(&self) -> JobArguments {
        JobArguments { output: self.output.clone(), ..JobArguments::new(&self.job, self.overrides.clone()) }
    }
}

#[derive(Args)]
pub(crate) struct BenchArguments {
    #[command(subcommand)]
    pub(crate) command: BenchCommand,
}

#[derive(Subcommand)]
pub(crate) enum BenchCommand {
    /// A training step: forward, backward, clipping and AdamW.
    Step(BenchStepArguments),
    /// Generation of a fixed number of tokens.
    Generate(BenchGenerateArguments),
    /// Sums over worker processes, beside a plain copy between them.
    Allreduce(BenchAllreduceArguments),
    /// Speed over the number of workers: measured here, modelled beyond.
    Scaling(BenchScalingArguments),
    /// A process of the two above, which start it.
    #[command(hide = true)]
    Rank,
    /// Loading and tokenizing a job's examples: its speed, and how long training at a given speed waits for it.
    Data(BenchDataArguments),
}

#[derive(Args)]
pub(crate) struct BenchAllreduceArguments {
    /// Worker processes.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) world_size: u32,
    /// The smallest sum; each is four times as large as the one before.
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 10)]
    pub(crate) min_bytes: usize,
    #[arg(long, value_name = "BYTES", default_value_t = 256 << 20)]
    pub(crate) max_bytes: usize,
    /// Timed sums of each size, of which the median counts, after one that is not timed.
    #[arg(long, default_value_t = 7)]
    pub(crate) iterations: usize,
    #[arg(long, value_enum, default_value_t)]
    pub(crate) device: DeviceChoice,
    /// Print the rows as one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct BenchScalingArguments {
    /// A directory, or a preset such as t5-small.
    #[arg(long, default_value = "t5-small")]
    pub(crate) model: String,
    /// Examples of a micro-batch. Weak scaling gives every worker one; strong scaling shares out as many as the most workers
    /// can each have one of.
    #[arg(long, default_value_t = 8)]
    pub(crate) batch_size: usize,
    #[arg(long, default_value_t = 128)]
    pub(crate) source_length: usize,
    #[arg(long, default_value_t = 32)]
    pub(crate) target_length: usize,
    /// Timed steps of each case, after two that are not.
    #[arg(long, default_value_t = 5)]
    pub(crate) steps: usize,
    /// Numbers of workers to measure; by default 1, 2, 4 … up to the cores or GPUs.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub(crate) workers: Vec<u32>,
    /// Timed sums of each kind that the model of the exchange is fitted to or checked on.
    #[arg(long, default_value_t = 5)]
    pub(crate) sums: usize,
    /// Model so many nodes at most, of one worker each.
    #[arg(long, default_value_t = 512)]
    pub(crate) nodes: u32,
    /// Networks to model: what a node sends and takes at a time, in 10⁹ bits a second.
    #[arg(long, value_name = "GBPS,…", value_delimiter = ',', default_value = "10,25,100")]
    pub(crate) network_gbps: Vec<f64>,
    /// Their latency, in microseconds.
    #[arg(long, value_name = "US", default_value_t = 30.0)]
    pub(crate) network_latency_us: f64,
    /// Draw efficiency over workers.
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t)]
    pub(crate) device: DeviceChoice,
    /// Print the rows as one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct BenchDataArguments {
    #[command(flatten)]
    pub(crate) job: DataJobArguments,
    /// Threads that tokenize; a worker has one.
    #[arg(long, default_value_t = 1)]
    pub(crate) threads: usize,
    /// How fast training consumes tokens.
    #[arg(long, default_value_t = 100_000)]
    pub(crate) tokens_per_second: u64,
    /// How long to measure each.
    #[arg(long, default_value_t = 3.0)]
    pub(crate) seconds: f64,
    /// Print one JSON object a row.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct BenchStepArguments {
    /// A directory, or a preset such as t5-small, t5-v1_1-base, byt5-small.
    #[arg(long)]
    pub(crate) model: String,
    #[arg(long, default_value_t = 8)]
    pub(crate) batch_size: usize,
    #[arg(long, default_value_t = 512)]
    pub(crate) source_length: usize,
    #[arg(long, default_value_t = 128)]
    pub(crate) target_length: usize,
    /// Examples of differing lengths, from a quarter of those to the whole, as real text has.
    #[arg(long)]
    pub(crate) ragged: bool,
    /// Timed steps, after some that are not.
    #[arg(long, default_value_t = 5)]
    pub(crate) steps: usize,
    /// fp32, tf32, bf16 or fp16; by default bf16 on a GPU, fp32 elsewhere.
    #[arg(long)]
    pub(crate) precision: Option<String>,
    #[arg(long)]
    pub(crate) gradient_checkpointing: bool,
    /// Train LoRA adapters of this rank, of q and v, instead of the model.
    #[arg(long, value_name = "R")]
    pub(crate) lora_r: Option<usize>,
    /// Threads to compute with; all cores by default.
    #[arg(long)]
    pub(crate) threads: Option<usize>,
    #[arg(long, value_enum, default_value_t)]
    pub(crate) device: DeviceChoice,
    /// Print the result as one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct BenchGenerateArguments {
    /// A directory, or a preset such as t5-small, t5-v1_1-base, byt5-small.
    #[arg(long)]
    pub(crate) model: String,
    #[arg(long, default_value_t = 32)]
    pub(crate) batch_size: usize,
    #[arg(long, default_value_t = 128)]
    pub(crate) source_length: usize,
    /// Tokens of each output, no more and no fewer.
    #[arg(long, default_value_t = 64)]
    pub(crate) new_tokens: usize,
    #[arg(long, default_value_t = 4)]
    pub(crate) num_beams: usize,
    #[arg(long)]
    pub(crate) do_sample: bool,
    /// Sources of differing lengths, from a quarter of that to the whole, as real text has.
    #[arg(long)]
    pub(crate) ragged: bool,
    /// Timed rounds, after one that is not.
    #[arg(long, default_value_t = 3)]
    pub(crate) rounds: usize,
    /// fp32, bf16 or fp16; by default bf16 on a GPU, fp32 elsewhere.
    #[arg(long)]
    pub(crate) precision: Option<String>,
    /// Threads to compute with; all cores by default.
    #[arg(long)]
    pub(crate) threads: Option<usize>,
    #[arg(long, value_enum, default_value_t)]
    pub(crate) device: DeviceChoice,
    /// Print the result as one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct SelftestArguments {
    #[arg(long, value_enum, default_value_t)]
    pub(crate) device: DeviceChoice,
    /// Print the rows as one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct DoctorArguments {
    /// Check every link between the hosts of a job: those that are named, or of Slurm's allocation.
    #[arg(long, value_name = "JOB")]
    pub(crate) cluster: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) hosts: HostArguments,
    /// Answer the doctor of another host.
    #[arg(long, hide = true, requires = "cluster")]
    pub(crate) probe: bool,
    /// Print the findings as one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
}
