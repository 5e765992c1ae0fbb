"""Writes the files of this folder with genuine torch, which the project does not have: python make.py

checkpoint.pth: a checkpoint as the official training code saves it, of a model with 1 block and width 4.
tensors.pt: dtypes, views and containers that a file may hold.
"""

import pathlib
from collections import OrderedDict

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
    save_tensors()
