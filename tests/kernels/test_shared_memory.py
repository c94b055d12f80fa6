"""The kernels of groups fit into the shared memory of GPUs that people have; compiled without one."""

import pytest
import torch
from kernel_helpers import INTERPRETED

from rlora_trl.kernels.rank_space import Layout, p_columns, z_columns


joint_ops = pytest.importorskip("rlora_trl.kernels.joint_ops", reason="needs Triton")
compiler = pytest.importorskip("triton.compiler")
backends = pytest.importorskip("triton.backends.compiler")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(INTERPRETED, reason="compiles")]

# Shared memory of a program in bytes: T4, A10 and RTX 30 and 40, H100.
LIMITS = {75: 64 * 1024, 86: 99 * 1024, 90: 227 * 1024}
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
FLOAT32 = ("partials_ptr", "dz_ptr", "db_ptr", "parts_ptr", "coeffs0_ptr", "coeffs1_ptr", "db0_ptr", "db1_ptr")


def shared_memory(variant, dtype, capability):
    """Bytes that a program of a kernel shares."""
    import triton

    names, constants = variant.kernel.arg_names, variant.constants
    arguments = names[: len(names) - len(constants)]
    fixed = dict(zip(names[len(arguments) :], constants, strict=True))
    pointers = [place for place, name in enumerate(arguments) if name.endswith("_ptr")]
    types = {name: "fp32" if name in ("keep_scale", "scaling") else "i32" for name in arguments}
    types |= {arguments[place]: "*fp32" if arguments[place] in FLOAT32 else TYPES[dtype] for place in pointers}
    types |= dict.fromkeys(fixed, "constexpr")
    aligned = {(place,): [["tt.divisibility", 16]] for place in pointers}
    source = compiler.ASTSource(variant.kernel, types, fixed, aligned)
    target = backends.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=variant.options).metadata.shared


@pytest.mark.parametrize("layout", [Layout(3, 4), Layout(1, 16, False), Layout(10, 4)], ids=str)
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(75, torch.float16), (86, torch.bfloat16), (86, torch.float32), (90, torch.bfloat16)],
    ids=str,
)
def test_kernels_fit(capability, dtype, layout):
    if tuple(int(part) for part in __import__("triton").__version__.split(".")[:2]) < (3, 3):
        pytest.skip("compiled otherwise")
    k, z = (-(-columns // 16) * 16 for columns in (p_columns(layout), z_columns(layout)))
    plan = joint_ops._Plan(2048, (11008, 11008), k, z, layout, dtype, capability < 80)
    for tokens in (3072, 16384):
        if not plan.holds_rows(tokens):
            continue
        flags = (True, True, True, False, False, True)
        variants = [
            joint_ops._project_variant(plan, joint_ops._project_block(tokens), (False,) * 3, flags),
            joint_ops._split_variant(plan, plan.share(tokens), True),
            joint_ops._join_variant(plan, (True, True, True, tokens <= joint_ops._FEW_TOKENS)),
        ]
        for variant in variants:
            assert shared_memory(variant, dtype, capability) <= LIMITS[capability], variant.kernel.__name__
