"""Writes the files of this folder with genuine torch, which the project does not have: python make.py

checkpoint.pth: a checkpoint as the official training code saves it, of a model with 1 block and width 4.
last.ckpt: the same parameters and averages as Lightning saves them (pip install lightning omegaconf), as in MDLM's
    code, with hyper-parameters of several classes.
tensors.pt: dtypes, views and containers that a file may hold.
"""

import functools
import pathlib
from collections import OrderedDict, defaultdict

import lightning
import numpy as np
import omegaconf
import torch
from torch import nn

HERE = pathlib.Path(__file__).parent
TOKENS, DIM, COND = 5, 4, 1


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(torch.ones(TOKENS + 1, DIM))


class Time(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, COND), nn.SiLU(), nn.Linear(COND, COND))


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.01]))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = Norm()
        self.attn_qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.attn_out = nn.Linear(DIM, DIM, bias=False)
        self.norm2 = Norm()
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        self.adaLN_modulation = nn.Linear(COND, 6 * DIM)


class Output(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_final = Norm()
        self.linear = nn.Linear(DIM, TOKENS + 1)
        self.adaLN_modulation = nn.Linear(COND, 2 * DIM)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.vocab_embed = Embedding()
        self.sigma_map = Time()
        self.rotary_emb = Rotary()
        self.blocks = nn.ModuleList([Block()])
        self.output_layer = Output()


def save_checkpoint() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    # Moments of one parameter, to keep the file small.
    model.blocks[0].norm1.weight.sum().backward()
    optimizer.step()
    for number, parameter in enumerate(model.parameters()):
        parameter.data = number + torch.arange(parameter.numel()).reshape(parameter.shape) / 1024
    shadows = [parameter.detach() + 0.5 for parameter in model.parameters()]
    ema = {"decay": 0.9999, "num_updates": 7, "shadow_params": shadows}
    state = {"optimizer": optimizer.state_dict(), "model": model.state_dict(), "ema": ema, "step": 7}
    torch.save(state, HERE / "checkpoint.pth")


class Tokenizer:
    def __init__(self):
        self.ranks, self.special = {("a", "b"): 0}, {"<|endoftext|>"}
        self.path, self.device, self.bytes = pathlib.Path("gpt2"), torch.device("cpu"), b"\x00\xff"
        self.itself = self


class Diffusion(lightning.LightningModule):
    def __init__(self, config, tokenizer, extra):
        super().__init__()
        self.save_hyperparameters()
        self.backbone, self.teacher = Model(), nn.Linear(1, 1)

    def on_save_checkpoint(self, checkpoint):
        shadows = [parameter.detach() + 0.5 for parameter in self.backbone.parameters()]
        checkpoint["ema"] = {"decay": 0.9999, "num_updates": 7, "shadow_params": shadows}
        checkpoint["sampler"] = {"random_state": None}

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.backbone.blocks[0].norm1.parameters(), lr=0.0, weight_decay=0.0)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(max, 1))]

    def training_step(self, batch, _):
        return self.backbone.blocks[0].norm1.weight.sum() + 0 * batch.sum()


def save_lightning() -> None:
    config = omegaconf.OmegaConf.create({"model": {"length": "${oc.env:HOME}", "n_heads": 1}, "list": [1, {"a": None}]})
    extra = {"counts": defaultdict(list, a=[1]), "scalar": np.float64(2.0), "shape": torch.Size([2]), "type": dict}
    module = Diffusion(config, Tokenizer(), extra)
    for number, parameter in enumerate(module.backbone.parameters()):
        parameter.data = number + torch.arange(parameter.numel()).reshape(parameter.shape) / 1024
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=7, enable_checkpointing=False, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(7, 1)))
    trainer.save_checkpoint(HERE / "last.ckpt")


def save_tensors() -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = OrderedDict(
        base=base,
        view=base.T[1:, ::2],
        scalar=torch.tensor(2.5),
        half=torch.tensor([0.1, -2.0]).half(),
        bfloat16=torch.tensor([0.1, -2.0]).bfloat16(),
        int64=torch.tensor([1 << 40, -1]),
        parameter=nn.Parameter(torch.ones(2)),
    )
    torch.save(tensors, HERE / "tensors.pt", pickle_protocol=4)


if __name__ == "__main__":
    save_checkpoint()
    save_lightning()
    save_tensors()
