"""Launchers of the Triton kernels, with the arguments and results of their torch twins in `rank_space.py`.

`fused.backend` imports this module if Triton is installed.
"""

import ast
import inspect
import logging
import textwrap
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

from . import triton_kernels as kernels
from .dropout import mask_threshold
from .rank_space import AdapterTensors, Layout, p_columns, z_columns
from .reference import BALANCE_LOSSES


logger = logging.getLogger(__name__)

# The arguments that `JITFunction.run` passes to the launcher of a compiled kernel, in Triton 3.2 to 3.6 alike: grid,
# stream and function, then `launch_metadata` and two hooks, then the kernel's own arguments. Before 3.3 these lack the
# constants that the kernel was compiled for.
_LAUNCHED_WITH = ("grid_0", "grid_1", "grid_2", "stream", "kernel.function", "kernel.packed_metadata")
_HOOKS = ("launch_metadata", "launch_enter_hook", "launch_exit_hook")
_NO_HOOKS = (None, None, None)
# The arguments that `CudaLauncher.__call__` passes on.
_LAUNCHER_CALLS = (
    *("gridX", "gridY", "gridZ", "stream", "function", "self.launch_cooperative_grid", "self.launch_pdl"),
    *("global_scratch", "profile_scratch", "*args"),
)
_TAKES_CONSTANTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
_KERNEL_ARGUMENTS = "*bound_args.values()" if _TAKES_CONSTANTS else "*non_constexpr_vals"
# Tokens per program of `mix_kernel` and `mix_backward_kernel`. Tiles are a few registers wide, so this only sets the
# number of programs.
_BLOCK_T = 64
# Elements per program of `concat_kernel`: of a row of A, and of a head.
_BLOCK_D = 1024
_BLOCK_W = 256
# Rows of partial sums that `finalize_routing_stats_kernel` adds up at a time.
_BLOCK_S = 128


@lru_cache(maxsize=1)
def has_known_launcher() -> bool:
    """
    Whether this version of Triton launches a compiled kernel by the call that [`Variant`] makes instead.

    That call is not a public interface of Triton, and a misplaced argument would be read as an address. Checked once
    per process; if the call differs, a warning says so and kernels are launched as `kernel[grid](...)`.
    """
    if _launches_as_known(triton.runtime.jit.JITFunction.run):
        return True
    logger.warning(
        f"Triton {triton.__version__} launches kernels in an unknown way (3.2 to 3.6 are supported), so every launch "
        "goes through Triton's own lookup: results are the same, but short steps take more host time. Install Triton "
        "3.6 or earlier, or a newer rlora-trl."
    )
    return False


def _nodes_of(function: Callable[..., Any]) -> list[ast.AST]:
    """All nodes of the source of a function; none if there is no source to read."""
    try:
        return list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    except (OSError, TypeError, SyntaxError):
        return []


def _launches_as_known(run: Callable[..., Any]) -> bool:
    """Whether the source of `JITFunction.run` has exactly one launcher call, with the expected arguments."""
    # One call by position, on the stream of the current device.
    nodes = _nodes_of(run)
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "kernel.run"]
    streams = [ast.unparse(node.value) for node in nodes if isinstance(node, ast.Assign) and _is_stream(node)]
    if len(calls) != 1 or calls[0].keywords or streams != ["driver.active.get_current_stream(device)"]:
        return False

    # Its arguments in order.
    first, hooks, arguments = len(_LAUNCHED_WITH), len(_HOOKS), [ast.unparse(arg) for arg in calls[0].args]
    return (
        tuple(arguments[:first]) == _LAUNCHED_WITH
        and tuple(arg.rsplit(".", 1)[-1] for arg in arguments[first : first + hooks]) == _HOOKS
        and arguments[first + hooks :] == [_KERNEL_ARGUMENTS]
    )


def _is_stream(node: ast.Assign) -> bool:
    return [ast.unparse(target) for target in node.targets] == ["stream"]


@lru_cache(maxsize=1)
def _several_devices() -> bool:
    return torch.cuda.device_count() > 1


class Variant:
    """
    A kernel with its constants.

    Compiled kernels are cached and launched through their own launcher, with addresses instead of tensors. That costs
    the host a quarter of Triton's lookup, which matters in short steps. (Profilers that hook into Triton's launches
    see the first one only.)

    Args:
        kernel (`triton.JITFunction`): Its parameters are tensors, then numbers that it is not specialized on, then
            constants.
        constants (`tuple`): Values of the constants.
        options: Options of the compiler, such as `num_warps`.
    """

    def __init__(self, kernel: Any, constants: tuple, **options: int) -> None:
        self.kernel, self.constants, self.options = kernel, constants, options
        self.compiled: dict[int, tuple] = {}  # by number of the device
        self.passed = constants if _TAKES_CONSTANTS else ()

    def launch(
        self,
        programs: int,
        tensors: tuple[torch.Tensor, ...],
        numbers: tuple = (),
        aligned: bool = True,
        stand_in: torch.Tensor | None = None,
    ) -> None:
        """
        Launch a one-dimensional grid.

        Args:
            programs (`int`): Size of the grid.
            tensors (`tuple[torch.Tensor, ...]`): Tensor arguments in order, of the same dtypes in all launches.
            numbers (`tuple`, *optional*, defaults to `()`): Number arguments in order.
            aligned (`bool`, *optional*, defaults to `True`): Whether all tensors start at multiples of 16 bytes, which
                Triton specializes on.
            stand_in (`torch.Tensor`, *optional*): One of the tensors, which takes the place of many missing ones.
        """
        device = tensors[0].get_device()  # -1 for the CPU
        if device >= 0 and _several_devices() and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.launch(programs, tensors, numbers, aligned, stand_in)

        # A compiled kernel is called through its launcher.
        cached = self.compiled.get(device) if aligned else None
        if cached is not None:
            run, function, added, stream_of = cached
            missing = 0 if stand_in is None else stand_in.data_ptr()
            addresses = [missing if tensor is stand_in else tensor.data_ptr() for tensor in tensors]
            run(programs, 1, 1, stream_of(device), function, *added, *addresses, *numbers, *self.passed)
            return None

        # The first launch goes through Triton, which compiles the kernel.
        compiled = self.kernel[(programs, 1, 1)](*tensors, *numbers, *self.constants, **self.options)
        # Triton's interpreter does not compile.
        if aligned and compiled is not None and has_known_launcher():
            stream_of = triton.runtime.driver.active.get_current_stream
            run, added = _launcher(compiled.run)
            self.compiled[device] = (run, compiled.function, (*added, compiled.packed_metadata, *_NO_HOOKS), stream_of)
        return None


def _launcher(run: Any) -> tuple[Any, tuple[Any, ...]]:
    """
    The function behind Triton's launcher, and the arguments that the launcher adds after the stream and the function.

    The launcher itself only allocates memory for kernels that need some, which takes a fifth of the host time of a
    launch. It is used as it is where it does more, or another version of it is installed.
    """
    sizes = (getattr(run, "global_scratch_size", None), getattr(run, "profile_scratch_size", None))
    if sizes != (0, 0) or not _adds_as_known(type(run).__call__):
        return run, ()
    return run.launch, (run.launch_cooperative_grid, run.launch_pdl, None, None)


@lru_cache(maxsize=8)
def _adds_as_known(call: Callable[..., Any]) -> bool:
    """Whether the source of `CudaLauncher.__call__` has the call that [`_launcher`] makes, as in Triton 3.6."""
    calls = [
        node for node in _nodes_of(call) if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.launch"
    ]
    return [[ast.unparse(arg) for arg in one.args] for one in calls] == [list(_LAUNCHER_CALLS)]


def padding(width: int, used: int) -> int:
    """The size of a tile that covers the columns of zeros."""
    return triton.next_power_of_2(max(width - used, 1))


def signed(value: int) -> int:
    """The lower 32 bits of a number as a signed integer, which Triton passes as one type whatever their value."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


@lru_cache(maxsize=64)
def dropout_numbers(dropout: float) -> tuple[int, float]:
    """The threshold of the bits of kept elements, and their scale."""
    return signed(mask_threshold(dropout)), 1.0 / (1.0 - dropout)


def mask_numbers(dropout: float, seed: int | torch.Tensor | None) -> tuple[int, int, int, float]:
    """Two halves of the seed, threshold and scale; a kernel loads a seed in memory itself."""
    if seed is None or dropout <= 0.0:
        return 0, 0, 0, 1.0
    if isinstance(seed, torch.Tensor):
        return 0, 0, *dropout_numbers(dropout)
    return signed(seed), signed(seed >> 32), *dropout_numbers(dropout)


def _seed_kind(dropout: float, seed: int | torch.Tensor | None) -> tuple[bool, bool]:
    """Whether anything is dropped, and whether the seed is in memory."""
    dropped = seed is not None and dropout > 0.0
    return dropped, dropped and isinstance(seed, torch.Tensor)


class _ConcatSizes(NamedTuple):
    """What `concat_kernel` is compiled for: sizes, layout, with or without a router, one or many layers, dtypes."""

    d_in: int
    d_out: int
    down_rows: int
    up_columns: int
    layout: Layout
    router: bool
    layers: bool
    dtypes: tuple[torch.dtype, ...]


@lru_cache(maxsize=1024)
def _concat_variant(sizes: _ConcatSizes) -> tuple[int, Variant]:
    """Programs per layer, and the kernel."""
    d_in, d_out, rows, columns, layout, router, layers, _ = sizes
    num_heads, r, routed, anchored, shared, _ = layout
    blocks = triton.cdiv(d_in, _BLOCK_D)
    extents = (d_in, d_out * r, rows * blocks, blocks, r, num_heads, columns, padding(columns, z_columns(layout)))
    constants = (*extents, routed, router, anchored, shared, _BLOCK_D, _BLOCK_W, layers)
    return rows * blocks + triton.cdiv(d_out * r, _BLOCK_W), Variant(kernels.concat_kernel, constants)


@lru_cache(maxsize=1024)
def _mix_variant(
    k: int, z: int, layout: Layout, dropped: bool, seed_in_memory: bool, stats: bool, *dtypes: torch.dtype
) -> Variant:
    """The kernel for dtypes of P and, if there is a token mask, of the mask."""
    num_heads, r, routed, anchored, shared, top_k = layout
    sizes = (r, triton.next_power_of_2(r), num_heads, triton.next_power_of_2(num_heads))
    kinds = (routed, anchored, shared, top_k if top_k < num_heads else 0)
    flags = (dropped, seed_in_memory, stats, len(dtypes) > 1, _BLOCK_T)
    return Variant(kernels.mix_kernel, (k, z, padding(z, z_columns(layout)), *sizes, *kinds, *flags))


@lru_cache(maxsize=1024)
def _mix_backward_variant(
    k: int,
    z: int,
    width: int,
    layout: Layout,
    dropped: bool,
    seed_in_memory: bool,
    balanced: bool,
    *dtypes: torch.dtype,
) -> Variant:
    """The kernel for dtypes of P and, if there is a token mask, of the mask."""
    num_heads, r, routed, anchored, shared, top_k = layout
    widths = (k, padding(k, p_columns(layout)), z, width, padding(width, num_heads * r))
    sizes = (r, triton.next_power_of_2(r), num_heads, triton.next_power_of_2(num_heads))
    kinds = (routed, anchored, shared, top_k if top_k < num_heads else 0)
    flags = (dropped, seed_in_memory, balanced, len(dtypes) > 1, _BLOCK_T)
    return Variant(kernels.mix_backward_kernel, (*widths, *sizes, *kinds, *flags))


def check_device(P: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Refuse tensors on another device; a kernel would misread their addresses."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != P.device:
            raise ValueError(
                f"`{name}` must be on {P.device}, like the activations, got {tensor.device}. Move it there."
            )


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether tensors start at multiples of 16 bytes; tensors of callers may be views."""
    return not any(tensor.data_ptr() % 16 for tensor in tensors)


def stats_rows(tokens: int) -> int:
    """See `rank_space.stats_rows`: one for each program of `mix_kernel`."""
    return -(-tokens // _BLOCK_T)


def _with_stand_ins(
    A: torch.Tensor,
    B: torch.Tensor,
    router: torch.Tensor | None,
    anchor_A: torch.Tensor | None,
    anchor_B: torch.Tensor | None,
) -> list[torch.Tensor]:
    """The five tensors; A and B stand in for missing ones, which the kernel does not read."""
    return [
        *(A, B, A if router is None else router),
        *(A if anchor_A is None else anchor_A, B if anchor_B is None else anchor_B),
    ]


def _launch_concat(
    tensors: list[torch.Tensor],
    addresses: torch.Tensor | None,
    layout: Layout,
    router: bool,
    scaling: float,
    downs: torch.Tensor,
    ups: torch.Tensor,
) -> None:
    """Fill `down` `[K, d_in]` and `up` `[d_out, Z]` of one layer, or of the L layers at `addresses` `[L, 5]`."""
    (down_rows, d_in), (d_out, up_columns) = downs.shape[-2:], ups.shape[-2:]
    dtypes = (downs.dtype, *[tensor.dtype for tensor in tensors])
    programs, variant = _concat_variant(
        _ConcatSizes(d_in, d_out, down_rows, up_columns, layout, router, addresses is not None, dtypes)
    )
    layers = 1 if addresses is None else addresses.shape[0]
    arguments = (tensors[0] if addresses is None else addresses, *tensors, downs, ups)
    # Parameters may be views into one buffer, as DeepSpeed and FSDP make them.
    variant.launch(programs * layers, arguments, (float(scaling),), aligned(*tensors))


def concat(
    A: torch.Tensor,
    B: torch.Tensor,
    router: torch.Tensor | None,
    anchor_A: torch.Tensor | None,
    anchor_B: torch.Tensor | None,
    layout: Layout,
    *,
    scaling: float,
    dtype: torch.dtype,
    down_rows: int,
    up_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rank_space.concat`."""
    down = torch.empty(down_rows, A.shape[-1], dtype=dtype, device=A.device)
    up = torch.empty(B.shape[1], up_columns, dtype=dtype, device=A.device)
    tensors = _with_stand_ins(A, B, router, anchor_A, anchor_B)
    contiguous = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]
    _launch_concat(contiguous, None, layout, router is not None, scaling, down, up)
    return down, up


def addresses_of(layers: list[AdapterTensors]) -> torch.Tensor:
    """The addresses `[L, 5]` of the tensors of L layers, for [`concat_many`]; valid until one of them moves."""
    rows = [[tensor.data_ptr() for tensor in _with_stand_ins(*tensors)] for tensors in layers]
    return torch.tensor(rows, dtype=torch.int64, device=layers[0][0].device)


def concat_many(
    layers: list[AdapterTensors],
    addresses: torch.Tensor | None,
    layout: Layout,
    *,
    scaling: float,
    dtype: torch.dtype,
    down_rows: int,
    up_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rank_space.concat_many`: one launch for all layers, whose tensors have the same dtypes."""
    if addresses is None:
        addresses = addresses_of(layers)
    A, B, router, *_ = layers[0]
    downs = torch.empty(len(layers), down_rows, A.shape[-1], dtype=dtype, device=A.device)
    ups = torch.empty(len(layers), B.shape[1], up_columns, dtype=dtype, device=A.device)
    _launch_concat(_with_stand_ins(*layers[0]), addresses, layout, router is not None, scaling, downs, ups)
    return downs, ups


def mix(
    P: torch.Tensor,
    z_width: int,
    layout: Layout,
    *,
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
    partials: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `rank_space.mix`."""
    tokens, k = P.shape
    Z = torch.empty(tokens, z_width, dtype=P.dtype, device=P.device)
    if tokens == 0:
        return Z

    # P stands in for missing tensors, which the kernel does not touch.
    masked = partials is not None and token_mask is not None
    if masked:
        check_device(P, token_mask=token_mask)
    mask = token_mask if token_mask is not None and masked else P
    tensors = (P, Z, P if partials is None else partials, mask, seed if isinstance(seed, torch.Tensor) else P)

    dropped, in_memory = _seed_kind(dropout, seed)
    dtypes = (P.dtype, mask.dtype) if masked else (P.dtype,)
    variant = _mix_variant(k, z_width, layout, dropped, in_memory, partials is not None, *dtypes)
    variant.launch(-(-tokens // _BLOCK_T), tensors, (tokens, *mask_numbers(dropout, seed)), aligned(mask))
    return Z


def mix_backward(
    P: torch.Tensor,
    dZ: torch.Tensor,
    layout: Layout,
    *,
    scaling: float = 1.0,
    heads_width: int = 0,
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
    coeffs: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rank_space.mix_backward`."""
    tokens, k = P.shape
    width = max(heads_width, layout.num_heads * layout.r)
    heads, dP = torch.empty(tokens, width, dtype=P.dtype, device=P.device), torch.empty_like(P)
    if tokens == 0:
        return heads, dP

    # P stands in for missing tensors, which the kernel does not touch.
    masked = coeffs is not None and token_mask is not None
    if masked:
        check_device(P, token_mask=token_mask)
    mask = token_mask if token_mask is not None and masked else P
    optional = (P if coeffs is None else coeffs, mask, seed if isinstance(seed, torch.Tensor) else P)

    dropped, in_memory = _seed_kind(dropout, seed)
    dtypes = (P.dtype, mask.dtype) if masked else (P.dtype,)
    variant = _mix_backward_variant(*(k, dZ.shape[1], width, layout, dropped, in_memory, coeffs is not None), *dtypes)
    numbers = (tokens, *mask_numbers(dropout, seed), float(scaling))
    variant.launch(-(-tokens // _BLOCK_T), (P, dZ, heads, dP, *optional), numbers, aligned(mask))
    return heads, dP


# Numbers of the losses in `finalize_routing_stats_kernel`.
_KINDS = {kind: number for number, kind in enumerate(BALANCE_LOSSES)}


@lru_cache(maxsize=1024)
def _finalize_variant(
    num_heads: int, kind: int, whole_step: bool, prior: bool, coeffs: bool, *dtypes: torch.dtype
) -> Variant:
    constants = (num_heads, triton.next_power_of_2(num_heads), kind, whole_step, prior, coeffs, _BLOCK_S)
    return Variant(kernels.finalize_routing_stats_kernel, constants)


def finalize_routing_stats(
    partials: torch.Tensor,
    stats: torch.Tensor,
    prior: torch.Tensor | None,
    layout: Layout,
    *,
    kind: str,
    factor: float,
    whole_step: bool,
    expected_tokens: float,
    upstream: torch.Tensor | None,
) -> torch.Tensor | None:
    """See `rank_space.finalize_routing_stats`."""
    check_device(partials, stats=stats, prior=prior, upstream=upstream)
    num_heads = layout.num_heads
    coeffs = None
    if upstream is not None:
        coeffs = torch.empty(num_heads + 2, dtype=torch.float32, device=partials.device)

    # `stats` stands in for missing tensors, which the kernel does not touch.
    tensors = (
        *(partials, stats, stats if prior is None else prior),
        *(stats if upstream is None else upstream, stats if coeffs is None else coeffs),
    )
    kinds = (_KINDS[kind], whole_step, prior is not None, coeffs is not None)
    variant = _finalize_variant(num_heads, *kinds, *[tensor.dtype for tensor in tensors])
    numbers = (partials.shape[0], float(factor), float(expected_tokens))
    variant.launch(1, tensors, numbers, aligned(*tensors))
    return coeffs


@lru_cache(maxsize=1024)
def _project_mix_variant(d_in: int, z: int, layout: Layout, dtype: torch.dtype) -> Variant:
    num_heads, r, routed, anchored, *_ = layout
    r2, heads2 = triton.next_power_of_2(r), triton.next_power_of_2(num_heads)
    # A tile of weights has r or N rows; this block size keeps it in registers.
    block = max(256, min(1024, 8192 // max(r2, heads2)))
    sizes = (d_in, z, padding(z, z_columns(layout)), r, r2, num_heads, heads2)
    return Variant(kernels.project_mix_kernel, (*sizes, routed, anchored, block))


def project_mix(x: torch.Tensor, down: torch.Tensor, z_width: int, layout: Layout) -> torch.Tensor:
    """See `rank_space.project_mix`."""
    x = x.contiguous()
    Z = torch.empty(x.shape[0], z_width, dtype=x.dtype, device=x.device)
    if x.shape[0] > 0:
        variant = _project_mix_variant(x.shape[1], z_width, layout, x.dtype)
        variant.launch(x.shape[0], (x, down, Z), (), aligned(x))
    return Z
