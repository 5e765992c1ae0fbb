"""SEDD small on OpenWebText, the paper's setting: 12 blocks, width 768, GPT-2's 50257 tokens, windows of 1024.

    python -m sedd_jax.prepare --data='/data/owt/*.jsonl' --valid_fraction=0.01 --tokenizer=gpt2 \
        --tokenizer_path=/data/gpt2 --output=openwebtext
    python -m sedd_jax.train --config=configs/small.py --workdir=DIR

/data/gpt2 holds GPT-2's two files, encoder.json and vocab.bpe; the default is the Hugging Face cache.
Hardware: 8 A100 and up, or 16 TPU v5e (--config.mesh.fsdp=8 --config.train.microbatches=4 --config.model.remat=dots:
3.1 GB per chip, docs/tpu.md); 170 M parameters, 524,288 tokens per step. Hours: 16 on 8 H100, 39 on 16 v5e, estimates
(docs/recipes.md). Not run on this hardware.
Smoke form, two minutes on a laptop: --config=configs/small.py:smoke
Expect zero-shot perplexities (Lou et al., table 1, absorbing): LAMBADA 50.92, WikiText-2 41.84, PTB 114.24,
WikiText-103 40.62, One Billion Words 79.29.
Numbers: Lou et al., arXiv 2310.16834, appendices C.2 and C.3, and the reference implementation (warm-up 2500, where the
paper has 2000; EMA 0.9999). The paper does not give the number of updates; 400,000 are a choice, 210 billion tokens.
"""

from ml_collections import ConfigDict, config_dict

from configs import smoke


def _integer(value: int) -> config_dict.FieldReference:
    """An integer field that may also be None."""
    return config_dict.FieldReference(value, field_type=int)


def get_config(form: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            # 'ar' for the AR baseline: the same network, causal, by cross-entropy; graph and noise are then not used.
            "objective": "sedd",
            # padding: states without text, which some published tables have rows for.
            "graph": {"kind": "absorbing", "padding": 0},
            "noise": {"kind": "loglinear", "eps": 1e-3, "sigma_min": 1e-4, "sigma_max": 20.0},
            "model": {
                "num_layers": 12,
                "dim": 768,
                "num_heads": 12,
                "cond_dim": 128,
                "mlp_ratio": 4,
                "dropout": 0.1,
                # 'mean': a softmax over the clean token, from which the scores follow; its loss is a cross-entropy.
                # 'plugin': the same, with the law of UDLM and Duo on the uniform graph.
                "parametrisation": "score",
                # False: the noise level is no input, and sampling calls the network only when a token has changed.
                "time_conditioning": True,
                # 't': the input is 1 - e^-sigma.
                "time_input": "sigma",
                "num_classes": 0,  # of data.label_field
                "lora_rank": 0,  # above 0: adapters to the model of --init, the rest frozen
                "lora_alpha": 16.0,
                # None: the absorbing graph's models divide out e^sigma - 1, the uniform graph's do not.
                "scale_by_sigma": config_dict.placeholder(bool),
                "qkv_bias": False,
                "dtype": "bfloat16",
                "residual_dtype": "float32",  # of the stream between the blocks
                # Devices sum gradients of weights in it; 'bfloat16' sends half the bytes.
                "gradient_dtype": "float32",
                "attention": "auto",
                "remat": "none",
            },
            "data": {
                "source": "shards:openwebtext",
                "valid_source": config_dict.placeholder(str),
                "valid_fraction": 0.01,
                "text_field": "text",
                # Of JSON lines; with one of these two a sequence is a record. tail: eot or unknown.
                "prompt_field": config_dict.placeholder(str),
                "label_field": config_dict.placeholder(str),
                "tail": "eot",
                "separator": config_dict.placeholder(str),
                "tokenizer": "gpt2",
                "tokenizer_path": config_dict.placeholder(str),
                "vocab_size": _integer(50_257),
                "length": 1024,
                "shift": True,
            },
            "optim": {
                "lr": 3e-4,
                "warmup_steps": 2500,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "decayed": "all",
                "clip": 1.0,
                "mu_dtype": "float32",
                "kind": "adamw",
                "decay": "none",
                "decay_steps": 0,
                "floor": 0.0,
            },
            "train": {
                "steps": 400_000,
                "batch_size": 512,  # x 1024 tokens = 524,288 tokens per step
                "microbatches": 1,
                "seed": 0,
                "ema_decay": 0.9999,
                "log_every": 50,
                "eval_every": 5_000,
                "sample_every": 10_000,
                "checkpoint_every": 1_000,
                "keep_last": 3,
                "keep_period": 50_000,
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "slices": -1},
            "eval": {"num_times": 128, "num_sequences": 1024, "batch_size": 64, "estimator": "auto"},
            "sampling": {
                "num": 8,
                "steps": 256,
                "method": "analytic",  # analytic, euler, trapezoidal, first_hitting, confidence, entropy
                "grid": "uniform",  # uniform, cosine
                "corrector_steps": 0,
                "corrector_size": 0.5,
                "entropy_budget": 0.1,  # nats per call of 'entropy'
                "remask": 0,  # tokens that a call of 'confidence' masks again
                "temperature": 1.0,  # these three narrow the distribution: biased
                "top_k": 0,
                "top_p": 1.0,
                "precision": "exact",
                "label": config_dict.placeholder(int),
                "guidance": 1.0,
            },
        }
    )
    return smoke.form(config, form)
