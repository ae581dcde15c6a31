"""Writes Hugging Face's defaults, which `quintet import-args` need not mention.

    python tests/references/arguments.py [OUT_FILE]   (default: cli/src/commands/import_args/defaults.json)

Needs transformers, accelerate and peft. Keys whose default says nothing (null, empty) are left out.
"""

import json
import sys
from pathlib import Path

from peft import LoraConfig
from transformers import GenerationConfig, Seq2SeqTrainingArguments

DEFAULT_OUTPUT = Path(__file__).resolve().parents[2] / "cli/src/commands/import_args/defaults.json"
OF_A_MACHINE = {"output_dir", "hub_token", "local_rank", "transformers_version", "peft_version", "run_name"}
# What versions before 5 write.
EARLIER = {
    "training": {
        "save_safetensors": True, "overwrite_output_dir": False, "logging_dir": None, "local_rank": 0, "warmup_ratio": 0.0,
        "jit_mode_eval": False, "use_ipex": False, "fp16_backend": "auto", "half_precision_backend": "auto",
        "fp16_opt_level": "O1", "no_cuda": False, "use_mps_device": False, "past_index": -1, "group_by_length": False,
        "tpu_metrics_debug": False, "fsdp_min_num_params": 0, "ray_scope": "last", "torchdynamo": None, "mp_parameters": "",
        "push_to_hub_model_id": None, "split_batches": None, "eval_use_gather_object": False, "optim": "adamw_torch",
        "include_tokens_per_second": False, "include_inputs_for_metrics": False, "include_num_input_tokens_seen": False,
        "fsdp": [], "fsdp_config": {
            "min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False,
        },
    },
    "lora": {},
    "generation": {
        "max_length": 20, "min_length": 0, "do_sample": False, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
        "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "use_cache": True,
        "early_stopping": False, "num_return_sequences": 1, "diversity_penalty": 0.0, "num_beam_groups": 1,
        "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
        "output_attentions": False, "output_hidden_states": False, "output_scores": False, "remove_invalid_values": False,
        "renormalize_logits": False, "return_dict_in_generate": False, "is_assistant": False, "use_mtp": False,
        "num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.4,
        "assistant_lookbehind": 10, "target_lookbehind": 10, "token_healing": False, "disable_compile": False,
        "_from_model_config": True,
    },
}


def main():
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_OUTPUT
    now = {
        "training": Seq2SeqTrainingArguments(output_dir="out").to_dict(),
        "lora": LoraConfig(task_type="SEQ_2_SEQ_LM").to_dict(),
        "generation": GenerationConfig().to_dict(),
    }
    defaults = {}
    for kind, keys in now.items():
        keys = {**EARLIER[kind], **{key: value for key, value in keys.items() if value is not None}}
        kept = {key: value for key, value in keys.items() if value not in (None, [], {}) and key not in OF_A_MACHINE}
        defaults[kind] = kept
    output.write_text(json.dumps(defaults, indent=1, default=str, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
