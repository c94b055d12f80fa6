"""Adapters of many kinds in plain PyTorch, to try ideas that the library does not have; several runs side by side.

One [`LabLinear`] holds the adapters of K runs: the rows of a batch belong to run 0, run 1, .. in equal parts, and each
run sees its own rows only. So K runs of one shape take little longer than one, as a step of a small model is limited
by the host. With h = A x, gates g and masks m_i:

    y = W x + s * ( sum_i g_i B_i (m_i . h) / (1 - p)  -  g0 sum_i B_i0 (A_i0 x) )

For settings that both have, outputs and gradients equal those of `rlora_trl` (tests/test_quality_benchmark.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn


GATES = ("softmax", "competing", "sigmoid", "uniform", "sum", "top_k", "task", "task_sigmoid", "task_shift", "own")
_BY_TASK = ("task", "task_sigmoid", "task_shift", "own")
# Of gates with a shift: its unit, so that gates and shifts learn at one rate.
_SHIFT = 0.1
INITS = ("rlora", "zero_a", "zero_b", "orthogonal", "mirrored")
SCALINGS = ("alpha/sqrt(r)", "alpha/r", "alpha/sqrt(rN)")
POSITIONS = ("head", "input")
_ALIGNED = 8  # columns


@dataclass(frozen=True)
class LabOptions:
    """
    Settings of a lab adapter. Those marked with * may differ between runs that train side by side.

    Args:
        r (`int`), heads (`int`), share_a (`bool`): As in `RLoraConfig`.
        ranks (`dict[str, int]`): Ranks by name of the layer (its last part), in place of `r`.
        targets (`tuple[str, ...]`): Names of the layers to adapt.
        gate (`str`): "softmax"; "competing" (N times it, so that each is 1 at the start); "sigmoid" (twice it, so that
            each is 1 at the start); "uniform" (each 1/N); "sum" (each 1); "top_k"; "task" (softmax, by task);
            "task_sigmoid" (likewise); "task_shift" (likewise, and each task adds a vector to each head's A x); "own"
            (each task has a head of its own, and no other).
        top_k (`int`): Gates that are not zero.
        temperature* (`float`): Divides the logits.
        router_init* (`str`): "zeros" or "kaiming_uniform".
        init* (`str`): "rlora" (Table 1 of the paper), "zero_a", "zero_b", "orthogonal" (rows of A and of all B
            orthogonal, with the norms of Table 1), or "mirrored" (Table 1, and the second half of the ranks is the
            first with opposite B: the initial delta is zero).
        anchor (`bool`): Subtract the initial delta, where it is not zero.
        gamma* (`float` or `dict[str, float]`): Constant of Table 1, for all layers or by name.
        share* (`float`): If not 0, gamma of each layer is such that the initial delta is expected to have this share
            of the Frobenius norm of the layer's weight.
        alpha* (`float`), scaling* (`str`): The factor of the delta.
        dropout* (`float`), position (`str`): Dropout on A x with a mask for each head, or on the x that A reads.
    """

    r: int = 4
    heads: int = 3
    share_a: bool = True
    ranks: dict[str, int] = field(default_factory=dict)
    targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    gate: str = "softmax"
    top_k: int = 0
    temperature: float = 1.0
    router_init: str = "zeros"
    init: str = "rlora"
    anchor: bool = True
    gamma: Any = 64.0
    share: float = 0.0
    alpha: float = 32.0
    scaling: str = "alpha/sqrt(r)"
    dropout: float = 0.0
    position: str = "head"

    def __post_init__(self) -> None:
        accepted = {"gate": GATES, "init": INITS, "scaling": SCALINGS, "position": POSITIONS}
        for name, choices in accepted.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if self.gate == "own" and self.has_anchor:
            raise ValueError("`gate='own'` needs an initial delta of zero, for example `init='zero_b'`.")
        if self.gate == "top_k" and not 0 < self.top_k <= self.heads:
            raise ValueError(f"`gate='top_k'` needs `top_k` from 1 to {self.heads}, got {self.top_k}.")
        object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def has_anchor(self) -> bool:
        """Whether an initial delta is subtracted."""
        return self.anchor and self.init in ("rlora", "orthogonal")

    def shape(self) -> tuple:
        """What runs that train side by side have in common."""
        position = self.position if self.dropout > 0 else None
        ranks = tuple(sorted(self.ranks.items()))
        return (
            self.r,
            self.heads,
            self.share_a,
            ranks,
            self.targets,
            self.gate,
            self.top_k,
            self.has_anchor,
            position,
        )

    def rank(self, name: str) -> int:
        return self.ranks.get(name, self.r)

    def factor(self, name: str) -> float:
        """The factor s of the delta in a layer."""
        r = self.rank(name)
        divisor = {"alpha/r": r, "alpha/sqrt(r)": math.sqrt(r), "alpha/sqrt(rN)": math.sqrt(r * self.heads)}
        return self.alpha / divisor[self.scaling]

    def gamma_of(self, name: str, d_out: int) -> float:
        """Gamma of a layer; with `share` that of a weight of norm 1."""
        if self.share:
            # Of N r products of a column of B and a row of A, each has the expected squared norm d_out / gamma^2.
            scale = self.factor(name) * self.first_gate * math.sqrt(self.heads * self.rank(name) * d_out)
            return scale / self.share
        return self.gamma[name] if isinstance(self.gamma, Mapping) else self.gamma

    @property
    def first_gate(self) -> float:
        """Each gate at the start."""
        return 1.0 if self.gate in ("sigmoid", "sum", "competing", "task_sigmoid", "task_shift") else 1.0 / self.heads


OPTION_NAMES = frozenset(option.name for option in fields(LabOptions))


@dataclass
class LabState:
    """What the layers of a model share: the task of each row of the batch, and whether dropout has ended."""

    tasks: torch.Tensor | None = None  # [K * rows]
    masks: bool = True


class LabLinear(nn.Module):
    """
    A frozen linear layer with the adapters of K runs.

    Args:
        base (`nn.Linear`): The layer.
        name (`str`): Its name, the last part.
        options (`Sequence[LabOptions]`): Of the runs, of one shape.
        state ([`LabState`]): That of the model.
        num_tasks (`int`): Tasks of a gate by task.
        generators (`Sequence[torch.Generator]`): Of the runs, for initial values.
    """

    def __init__(
        self,
        base: nn.Linear,
        name: str,
        options: Sequence[LabOptions],
        state: LabState,
        num_tasks: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        self.base_layer, self.options, self.state = base, options[0], state
        self.runs, self.r = len(options), options[0].rank(name)
        device, dtype = base.weight.device, base.weight.dtype
        drawn = [self._draw(o, name, num_tasks, g) for o, g in zip(options, generators, strict=True)]
        stacked = {key: torch.stack([values[key] for values in drawn]).to(device) for key in drawn[0]}
        if any(o.share for o in options):
            # On the device, as reading the norm would wait for it.
            root = torch.linalg.vector_norm(base.weight.detach().float()).sqrt()
            for k, o in enumerate(options):
                if o.share:
                    stacked["A"][k] *= root
                    stacked["B"][k] *= root
        self.A = nn.Parameter(stacked["A"])  # [K, N or 1, r, d_in]
        self.B = nn.Parameter(stacked["B"])  # [K, N, r, d_out], transposed
        self.router = nn.Parameter(stacked["router"]) if "router" in stacked else None

        def per_run(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, device=device)[:, None, None, None]

        # Constant gates go into the factor.
        constant = self.options.gate in ("uniform", "sum")
        first = self.options.first_gate
        self.factors = per_run([o.factor(name) * (first if constant else 1.0) for o in options])  # [K, 1, 1, 1]
        self.first_gate = 1.0 if constant else first
        self.temperature = None
        if any(o.temperature != 1.0 for o in options):
            self.temperature = per_run([o.temperature for o in options])[..., 0]
        self.keep = per_run([1.0 - o.dropout for o in options]) if any(o.dropout for o in options) else None

        self.B0 = self._anchored(self.B.detach()).clone() if self.options.has_anchor else None
        self._lay_out(dtype)

    def _lay_out(self, dtype: torch.dtype) -> None:
        """
        Columns of the products: P = [A x, logits, A0 x, zeros] and Z = [heads, A0 x, zeros].

        Zeros make their number a multiple of 8, for which products are faster, where they cost no operation more.
        """
        o = self.options
        heads, rows = o.heads * self.r, self.A.shape[1] * self.r
        gates = o.heads if self.router is not None and o.gate not in _BY_TASK else 0
        anchor = rows if self.B0 is not None else 0
        self.is_plain = o.gate in ("uniform", "sum") and rows == heads and not anchor
        pad_p = pad_z = 0
        if (anchor or self.is_plain) and not (self.keep is not None and o.position == "input"):
            pad_z = -(heads + anchor) % _ALIGNED
            pad_p = -(rows + gates + anchor) % _ALIGNED
            pad_p += _ALIGNED if pad_p < pad_z else 0
        self.rows, self.gates, self.z_end = rows, gates, rows + gates + anchor + pad_z

        # What does not change of the matrices: A0 and zeros, in the dtype of the products.
        A0 = self.A.detach().flatten(1, 2)[:, :anchor].to(dtype)
        self.constant_down = (
            torch.cat([A0, A0.new_zeros(self.runs, pad_p, A0.shape[2])], 1) if anchor + pad_p else None
        )
        self.constant_up = A0.new_zeros(self.runs, pad_z, self.B.shape[-1]) if pad_z else None

    def _anchored(self, B: torch.Tensor) -> torch.Tensor:
        """The heads that an anchor stores: with a shared A, their sum."""
        return B.sum(1, keepdim=True) if self.options.share_a else B

    def _draw(self, o: LabOptions, name: str, num_tasks: int, g: torch.Generator) -> dict[str, torch.Tensor]:
        """Initial values of one run, in float32."""
        d_in, d_out = self.base_layer.in_features, self.base_layer.out_features
        A = torch.empty(1 if o.share_a else o.heads, self.r, d_in)
        B = torch.empty(o.heads, self.r, d_out)
        common = d_out**0.25 / math.sqrt(o.gamma_of(name, d_out))
        if o.init == "orthogonal":
            for tensor in (A, B):
                nn.init.orthogonal_(tensor.view(-1, tensor.shape[-1]), gain=common, generator=g)
        else:
            if o.init in ("rlora", "mirrored"):
                A.normal_(0.0, common / math.sqrt(d_in), generator=g)
            elif o.init == "zero_a":
                A.zero_()
            else:
                A.uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=g)
            if o.init == "zero_b":
                B.zero_()
            else:
                B.normal_(0.0, common / math.sqrt(d_out), generator=g)
        if o.init == "mirrored":
            half = self.r // 2
            A[:, half : 2 * half], B[:, half : 2 * half] = A[:, :half], -B[:, :half]
            B[:, 2 * half :] = 0.0
        values = {"A": A, "B": B}
        if o.gate not in ("uniform", "sum", "own"):
            shape = (num_tasks, o.heads) if o.gate in _BY_TASK else (o.heads, d_in)
            if o.gate == "task_shift":
                shape = (num_tasks, o.heads * (1 + self.r))
            router = torch.zeros(shape)
            if o.router_init == "kaiming_uniform":
                router.uniform_(-1 / math.sqrt(shape[1]), 1 / math.sqrt(shape[1]), generator=g)
            values["router"] = router
        return values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = self.base_layer(x)
        K, o, dtype = self.runs, self.options, x.dtype
        tokens = x.reshape(K, -1, x.shape[-1])  # [K, T, d_in]
        masked = self.training and self.state.masks and self.keep is not None

        # All products with x at once; with dropout on the input, that with A apart.
        A = self.A.flatten(1, 2)
        down = (torch.cat([A, self.router], 1) if self.gates else A).to(dtype)
        if self.constant_down is not None:
            down = torch.cat([down, self.constant_down], 1)
        if masked and o.position == "input":
            keep = self.keep[..., 0]
            dropped = tokens * ((torch.rand(tokens.shape, device=x.device) < keep) / keep).to(dtype)
            P = torch.bmm(dropped, down[:, : self.rows].mT)
            if down.shape[1] > self.rows:
                P = torch.cat([P, torch.bmm(tokens, down[:, self.rows :].mT)], 2)
        else:
            P = torch.bmm(tokens, down.mT)

        Z = P if self.is_plain and not (masked and o.position == "head") else self._mix(P, masked, x.shape)
        up = self.factors * self.B
        if self.B0 is not None:
            # The difference before rounding, as the library does.
            shift = (self.factors * self.first_gate) * (self._anchored(self.B) - self.B0)
            up = torch.cat([up, shift], 1)
        up = up.flatten(1, 2).to(dtype)
        if self.constant_up is not None:
            up = torch.cat([up, self.constant_up], 1)
        return torch.baddbmm(base.view(K, -1, base.shape[-1]), Z, up).view(base.shape)

    def _mix(self, P: torch.Tensor, masked: bool, shape: torch.Size) -> torch.Tensor:
        """Z: A x for each head times its gate and less the initial value, and A0 x."""
        o = self.options
        h, start = P[..., : self.rows], self.rows + self.gates
        end = P[..., start : self.z_end]  # A0 x and zeros
        h0 = P[..., start : start + self.rows] if self.B0 is not None else None
        masked = masked and o.position == "head"
        constant = o.gate in ("uniform", "sum")
        if constant and not masked and (o.heads == 1 or not o.share_a):
            Z = h if h0 is None else h - h0
        else:
            heads = _wide(h).unflatten(2, (-1, self.r))  # [K, T, N or 1, r]
            if constant:
                heads = heads.expand(-1, -1, o.heads, -1)
            else:
                logits = None if o.gate in _BY_TASK else P[..., self.rows : start]
                gates = self._gates(logits, shape)
                heads = heads * gates[..., : o.heads].unsqueeze(-1)
                if o.gate == "task_shift":
                    heads = heads + gates[..., o.heads :].unflatten(2, (o.heads, self.r))
            if masked:
                heads = heads * ((torch.rand(heads.shape, device=h.device) < self.keep) / self.keep)
            if h0 is not None:
                heads = heads - self.first_gate * _wide(h0).unflatten(2, (-1, self.r))
            Z = heads.flatten(2).to(P.dtype)
        return torch.cat([Z, end], 2) if end.shape[2] else Z

    def _gates(self, logits: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
        """Gates `[K, T, N]` in float32; with a shift also this, `[K, T, N + N r]`."""
        o = self.options
        if o.gate in _BY_TASK:
            tasks = self.state.tasks.view(self.runs, -1)  # [K, rows]
            if o.gate == "own":
                return torch.nn.functional.one_hot(tasks, o.heads).float().repeat_interleave(shape[1:-1].numel(), 1)
            by_row = self.router.gather(1, tasks[..., None].expand(-1, -1, self.router.shape[2]))
            logits = by_row.repeat_interleave(shape[1:-1].numel(), 1)  # [K, T, N]
        logits = _wide(logits)
        if self.temperature is not None:
            logits = logits / self.temperature
        if o.gate == "task_shift":
            return torch.cat([2 * torch.sigmoid(logits[..., : o.heads]), _SHIFT * logits[..., o.heads :]], -1)
        if o.gate in ("sigmoid", "task_sigmoid"):
            return 2 * torch.sigmoid(logits)
        if o.gate == "top_k" and o.top_k < o.heads:
            smallest = logits.topk(o.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, float("-inf"))
        gates = torch.softmax(logits, -1)
        return o.heads * gates if o.gate == "competing" else gates


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 as before."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def add_lab(
    model: nn.Module, options: Sequence[LabOptions], seeds: Sequence[int], num_tasks: int
) -> tuple[nn.Module, LabState]:
    """
    Put the adapters of several runs into a model, whose own parameters are frozen.

    Args:
        model (`nn.Module`): The model; its layers are replaced.
        options (`Sequence[LabOptions]`), seeds (`Sequence[int]`): Of the runs.
        num_tasks (`int`): Tasks of gates by task.

    Raises:
        ValueError: If the runs differ in shape, or the model has no such layers.
    """
    if len({o.shape() for o in options}) != 1:
        raise ValueError("Runs that train side by side must have adapters of one shape.")
    model.requires_grad_(False)
    state, generators = LabState(), [torch.Generator().manual_seed(seed) for seed in seeds]
    found = [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in options[0].targets]
    if not found:
        raise ValueError(f"The model has no layers {', '.join(options[0].targets)}.")
    for path, module in found:
        parent, _, name = path.rpartition(".")
        layer = LabLinear(module, name, options, state, num_tasks, generators)
        setattr(model.get_submodule(parent), name, layer)
    return model, state
