"""Launchers of the Triton kernels: each has the arguments and results of its torch twin in `rank_space.py`.

Imported only where Triton is.
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
from .rank_space import AdapterTensors, Layout


logger = logging.getLogger(__name__)

# What `JITFunction.run` passes to the launcher of a compiled kernel, in Triton 3.2 to 3.6 alike: the grid and what to
# run, then `launch_metadata` and two hooks, then the kernel's own arguments. Before 3.3 these lack the constants that
# the kernel was compiled for.
_LAUNCHED_WITH = ("grid_0", "grid_1", "grid_2", "stream", "kernel.function", "kernel.packed_metadata")
_HOOKS = ("launch_metadata", "launch_enter_hook", "launch_exit_hook")
_TAKES_CONSTANTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
_OWN_ARGUMENTS = "*bound_args.values()" if _TAKES_CONSTANTS else "*non_constexpr_vals"
# Tokens of one program of the kernels that only mix. The tiles are a few registers wide, so that this only sets how
# many programs there are.
_BLOCK_T = 64
# Elements of one program that copies weights: of a row of A, and of a head.
_BLOCK_D = 1024
_BLOCK_W = 256
# Rows of partial sums that are added up at a time.
_BLOCK_S = 128


@lru_cache(maxsize=1)
def has_known_launcher() -> bool:
    """
    Whether this version of Triton launches a compiled kernel by the call that [`_Variant`] makes in its place.

    That call is no public interface of Triton, and an argument in another place would be read as an address. Looked up
    once in a process; if it is another one, a warning says so and kernels are launched as `kernel[grid](...)`.
    """
    if _launches_as_known(triton.runtime.jit.JITFunction.run):
        return True
    logger.warning(
        f"Triton {triton.__version__} launches kernels in a way that is not known here (3.2 to 3.6 are), so they are "
        "launched through its look-up: results are the same, and short steps take longer on the host. Install a "
        "version of rlora-trl that knows it, or an earlier Triton."
    )
    return False


def _launches_as_known(run: Callable[..., Any]) -> bool:
    """Whether the source of `JITFunction.run` has the one call of a launcher that is known."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(run)))
    except (OSError, TypeError, SyntaxError):  # there is no source to read
        return False
    nodes = list(ast.walk(tree))
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "kernel.run"]
    streams = [ast.unparse(node.value) for node in nodes if isinstance(node, ast.Assign) and _is_stream(node)]
    if len(calls) != 1 or calls[0].keywords or streams != ["driver.active.get_current_stream(device)"]:
        return False

    first, hooks, own = len(_LAUNCHED_WITH), len(_HOOKS), [ast.unparse(arg) for arg in calls[0].args]
    return (
        tuple(own[:first]) == _LAUNCHED_WITH
        and tuple(arg.rsplit(".", 1)[-1] for arg in own[first : first + hooks]) == _HOOKS
        and own[first + hooks :] == [_OWN_ARGUMENTS]
    )


def _is_stream(node: ast.Assign) -> bool:
    return [ast.unparse(target) for target in node.targets] == ["stream"]


class _Variant:
    """
    A kernel with its constants.

    Compiled kernels are kept and launched through their own launcher, with addresses in place of tensors: that costs
    the host a quarter of what Triton's look-up takes, which counts where steps are short. (Profilers that hook into
    Triton's launches see the first one only.)

    Args:
        kernel: The jitted function, whose parameters are tensors, then numbers that it is not specialized on, then
            constants.
        constants (`tuple`): The latter.
    """

    def __init__(self, kernel: Any, constants: tuple) -> None:
        self.kernel, self.constants = kernel, constants
        self.compiled: dict[int, tuple] = {}  # by number of the device
        self.passed = constants if _TAKES_CONSTANTS else ()

    def launch(
        self, programs: int, tensors: tuple[torch.Tensor, ...], numbers: tuple = (), aligned: bool = True
    ) -> None:
        """
        Launch a one-dimensional grid.

        Args:
            programs (`int`): Its size.
            tensors (`tuple[torch.Tensor, ...]`), numbers (`tuple`): Arguments in order, of the same dtypes in all
                launches.
            aligned (`bool`): Whether all tensors are known to start at multiples of 16 bytes, which Triton
                specializes on.
        """
        device = tensors[0].get_device()  # -1 for the CPU
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.launch(programs, tensors, numbers, aligned)
        known = self.compiled.get(device) if aligned else None
        if known is not None:
            run, function, metadata, stream_of = known
            addresses = [tensor.data_ptr() for tensor in tensors]
            nothing = (None, None, None)  # for hooks: none to call before and after
            run(programs, 1, 1, stream_of(device), function, metadata, *nothing, *addresses, *numbers, *self.passed)
            return None
        compiled = self.kernel[(programs, 1, 1)](*tensors, *numbers, *self.constants)
        # The interpreter compiles nothing.
        if aligned and compiled is not None and has_known_launcher():
            stream_of = triton.runtime.driver.active.get_current_stream
            self.compiled[device] = (compiled.run, compiled.function, compiled.packed_metadata, stream_of)
        return None


def _padding(width: int, used: int) -> int:
    """A size for a tile that covers the columns of zeros."""
    return triton.next_power_of_2(max(width - used, 1))


def _signed(value: int) -> int:
    """The lower 32 bits of a number, as a signed integer: Triton passes those as one type, whatever their value."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


@lru_cache(maxsize=64)
def _dropout_numbers(dropout: float) -> tuple[int, float]:
    """The threshold that the bits of an element that is kept reach, and the scale of what is kept."""
    return _signed(mask_threshold(dropout)), 1.0 / (1.0 - dropout)


def _mask_numbers(dropout: float, seed: int | torch.Tensor | None) -> tuple[int, int, int, float]:
    """Two halves of the seed, threshold and scale; a kernel reads a seed that is in memory itself."""
    if seed is None or dropout <= 0.0:
        return 0, 0, 0, 1.0
    if isinstance(seed, torch.Tensor):
        return 0, 0, *_dropout_numbers(dropout)
    return _signed(seed), _signed(seed >> 32), *_dropout_numbers(dropout)


def _seed_kind(dropout: float, seed: int | torch.Tensor | None) -> tuple[bool, bool]:
    """Whether anything is dropped, and whether the seed is in memory."""
    dropped = seed is not None and dropout > 0.0
    return dropped, dropped and isinstance(seed, torch.Tensor)


class _PackSizes(NamedTuple):
    """What `concat_kernel` is compiled for: sizes, layout, whether there is a router or many layers, dtypes."""

    d_in: int
    d_out: int
    down_rows: int
    up_columns: int
    layout: Layout
    router: bool
    layers: bool
    dtypes: tuple[torch.dtype, ...]


@lru_cache(maxsize=1024)
def _pack_variant(sizes: _PackSizes) -> tuple[int, _Variant]:
    """Programs for a layer, and the kernel."""
    d_in, d_out, rows, columns, layout, router, layers, _ = sizes
    num_heads, r, routed, anchored, shared, _ = layout
    blocks = triton.cdiv(d_in, _BLOCK_D)
    own = (d_in, d_out * r, rows * blocks, blocks, r, num_heads, columns, _padding(columns, layout.z_columns))
    constants = (*own, routed, router, anchored, shared, _BLOCK_D, _BLOCK_W, layers)
    return rows * blocks + triton.cdiv(d_out * r, _BLOCK_W), _Variant(kernels.concat_kernel, constants)


@lru_cache(maxsize=1024)
def _mix_variant(
    k: int, z: int, layout: Layout, dropped: bool, seed_in_memory: bool, statistics: bool, *dtypes: torch.dtype
) -> _Variant:
    """The kernel for dtypes of P and, where tokens are masked, of the mask."""
    num_heads, r, routed, anchored, shared, top_k = layout
    sizes = (r, triton.next_power_of_2(r), num_heads, triton.next_power_of_2(num_heads))
    kinds = (routed, anchored, shared, top_k if top_k < num_heads else 0)
    flags = (dropped, seed_in_memory, statistics, len(dtypes) > 1, _BLOCK_T)
    return _Variant(kernels.mix_kernel, (k, z, _padding(z, layout.z_columns), *sizes, *kinds, *flags))


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
) -> _Variant:
    """The kernel for dtypes of P and, where tokens are masked, of the mask."""
    num_heads, r, routed, anchored, shared, top_k = layout
    widths = (k, _padding(k, layout.p_columns), z, width, _padding(width, num_heads * r))
    sizes = (r, triton.next_power_of_2(r), num_heads, triton.next_power_of_2(num_heads))
    kinds = (routed, anchored, shared, top_k if top_k < num_heads else 0)
    flags = (dropped, seed_in_memory, balanced, len(dtypes) > 1, _BLOCK_T)
    return _Variant(kernels.mix_backward_kernel, (*widths, *sizes, *kinds, *flags))


def _check_device(P: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """A kernel that is launched with addresses would read any."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != P.device:
            raise ValueError(
                f"`{name}` must be on {P.device}, where the activations are, and is on {tensor.device}. Move it there."
            )


def _aligned(*tensors: torch.Tensor) -> bool:
    """Whether tensors start at multiples of 16 bytes: those that come from outside may be views."""
    return not any(tensor.data_ptr() % 16 for tensor in tensors)


def statistics_rows(tokens: int) -> int:
    """See `rank_space.statistics_rows`: one for each program of `mix`."""
    return -(-tokens // _BLOCK_T)


def _places(
    A: torch.Tensor,
    B: torch.Tensor,
    router: torch.Tensor | None,
    anchor_A: torch.Tensor | None,
    anchor_B: torch.Tensor | None,
) -> list[torch.Tensor]:
    """The tensors; where one is missing its place is taken by one that is there, and not read."""
    places = [A, B, A if router is None else router, A if anchor_A is None else anchor_A]
    places.append(B if anchor_B is None else anchor_B)
    return places


def _launch_pack(
    places: list[torch.Tensor],
    addresses: torch.Tensor | None,
    layout: Layout,
    router: bool,
    scaling: float,
    downs: torch.Tensor,
    ups: torch.Tensor,
) -> None:
    """Fill `down` and `up` of one layer, or of the L at `addresses`."""
    (down_rows, d_in), (d_out, up_columns) = downs.shape[-2:], ups.shape[-2:]
    dtypes = (downs.dtype, *[tensor.dtype for tensor in places])
    programs, variant = _pack_variant(
        _PackSizes(d_in, d_out, down_rows, up_columns, layout, router, addresses is not None, dtypes)
    )
    layers = 1 if addresses is None else addresses.shape[0]
    tensors = (places[0] if addresses is None else addresses, *places, downs, ups)
    # Parameters may be views into one buffer, as DeepSpeed and FSDP make them.
    variant.launch(programs * layers, tensors, (float(scaling),), _aligned(*places))


def pack(
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
    """See `rank_space.pack`."""
    down = torch.empty(down_rows, A.shape[-1], dtype=dtype, device=A.device)
    up = torch.empty(B.shape[1], up_columns, dtype=dtype, device=A.device)
    places = _places(A, B, router, anchor_A, anchor_B)
    given = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in places]
    _launch_pack(given, None, layout, router is not None, scaling, down, up)
    return down, up


def addresses_of(layers: list[AdapterTensors]) -> torch.Tensor:
    """Where the tensors of layers are, for [`concat_layers`], which needs it anew when they have moved."""
    rows = [[tensor.data_ptr() for tensor in _places(*tensors)] for tensors in layers]
    return torch.tensor(rows, dtype=torch.int64, device=layers[0][0].device)


def concat_layers(
    layers: list[AdapterTensors],
    addresses: torch.Tensor | None,
    layout: Layout,
    *,
    scaling: float,
    dtype: torch.dtype,
    down_rows: int,
    up_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rank_space.concat_layers`: one launch for all layers, which have tensors of the same dtypes."""
    if addresses is None:
        addresses = addresses_of(layers)
    A, B, router, *_ = layers[0]
    downs = torch.empty(len(layers), down_rows, A.shape[-1], dtype=dtype, device=A.device)
    ups = torch.empty(len(layers), B.shape[1], up_columns, dtype=dtype, device=A.device)
    _launch_pack(_places(*layers[0]), addresses, layout, router is not None, scaling, downs, ups)
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
    if tokens > 0:
        masked = partials is not None and token_mask is not None
        if masked:
            _check_device(P, token_mask=token_mask)
        dropped, in_memory = _seed_kind(dropout, seed)
        # Where a tensor is missing its place is taken by one that is there, and not touched.
        counted = token_mask if token_mask is not None and masked else P
        dtypes = (P.dtype, counted.dtype) if masked else (P.dtype,)
        variant = _mix_variant(k, z_width, layout, dropped, in_memory, partials is not None, *dtypes)
        places = (P, Z, P if partials is None else partials, counted, seed if isinstance(seed, torch.Tensor) else P)
        variant.launch(-(-tokens // _BLOCK_T), places, (tokens, *_mask_numbers(dropout, seed)), _aligned(counted))
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
    slope: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rank_space.mix_backward`."""
    tokens, k = P.shape
    width = max(heads_width, layout.num_heads * layout.r)
    heads, dP = torch.empty(tokens, width, dtype=P.dtype, device=P.device), torch.empty_like(P)
    if tokens > 0:
        masked = slope is not None and token_mask is not None
        if masked:
            _check_device(P, token_mask=token_mask)
        dropped, in_memory = _seed_kind(dropout, seed)
        # Where a tensor is missing its place is taken by one that is there, and not touched.
        counted = token_mask if token_mask is not None and masked else P
        dtypes = (P.dtype, counted.dtype) if masked else (P.dtype,)
        kinds = (dropped, in_memory, slope is not None)
        variant = _mix_backward_variant(k, dZ.shape[1], width, layout, *kinds, *dtypes)
        given = (P if slope is None else slope, counted, seed if isinstance(seed, torch.Tensor) else P)
        numbers = (tokens, *_mask_numbers(dropout, seed), float(scaling))
        variant.launch(-(-tokens // _BLOCK_T), (P, dZ, heads, dP, *given), numbers, _aligned(counted))
    return heads, dP


_KINDS = {"none": 0, "switch": 1, "importance": 2, "mutual_information": 3, "z": 4}


@lru_cache(maxsize=1024)
def _summarise_variant(
    num_heads: int, kind: int, whole_step: bool, prior: bool, slope: bool, *dtypes: torch.dtype
) -> _Variant:
    constants = (num_heads, triton.next_power_of_2(num_heads), kind, whole_step, prior, slope, _BLOCK_S)
    return _Variant(kernels.finalize_routing_stats_kernel, constants)


def finalize_routing_stats(
    partials: torch.Tensor,
    record: torch.Tensor,
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
    _check_device(partials, record=record, prior=prior, upstream=upstream)
    num_heads = layout.num_heads
    slope = None
    if upstream is not None:
        slope = torch.empty(num_heads + 2, dtype=torch.float32, device=partials.device)
    tensors = (
        *(partials, record, record if prior is None else prior),
        *(record if upstream is None else upstream, record if slope is None else slope),
    )
    kinds = (_KINDS[kind], whole_step, prior is not None, slope is not None)
    variant = _summarise_variant(num_heads, *kinds, *[tensor.dtype for tensor in tensors])
    numbers = (partials.shape[0], float(factor), float(expected_tokens))
    variant.launch(1, tensors, numbers, _aligned(*tensors))
    return slope


@lru_cache(maxsize=1024)
def _project_mix_variant(d_in: int, z: int, layout: Layout, dtype: torch.dtype) -> _Variant:
    num_heads, r, routed, anchored, *_ = layout
    r2, heads2 = triton.next_power_of_2(r), triton.next_power_of_2(num_heads)
    # A tile of weights has r or N rows; this keeps it in registers.
    block = max(256, min(1024, 8192 // max(r2, heads2)))
    sizes = (d_in, z, _padding(z, layout.z_columns), r, r2, num_heads, heads2)
    return _Variant(kernels.project_mix_kernel, (*sizes, routed, anchored, block))


def project_mix(x: torch.Tensor, down: torch.Tensor, z_width: int, layout: Layout) -> torch.Tensor:
    """See `rank_space.project_mix`."""
    x = x.contiguous()
    Z = torch.empty(x.shape[0], z_width, dtype=x.dtype, device=x.device)
    if x.shape[0] > 0:
        variant = _project_mix_variant(x.shape[1], z_width, layout, x.dtype)
        variant.launch(x.shape[0], (x, down, Z), (), _aligned(x))
    return Z
