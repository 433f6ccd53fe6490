"""Every Triton kernel compiles for Hopper, without a GPU: no stack, no spills, 16-byte accesses."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile; run without TRITON_INTERPRET", allow_module_level=True)

from hypergrad_ext.kernels import (  # noqa: E402
    cg_step,
    chebyshev_step,
    glm,
    lstm,
    minres_step,
    mlp,
    neumann_step,
    richardson_step,
    softmax,
)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Kernels, and the constants that they are compiled for besides the size of a block.
KERNELS = [
    (neumann_step.step_kernel, {}),
    *((richardson_step.step_kernel, {"PRECONDITIONED": m}) for m in (False, True)),
    *((chebyshev_step.step_kernel, {"PRECONDITIONED": m}) for m in (False, True)),
    *((k, {}) for k in (minres_step.dot_kernel, minres_step.vectors_kernel, minres_step.close_kernel)),
    *((cg_step.dots_kernel, {"COLUMNS": columns}) for columns in (4, 5)),
    *((cg_step.advance_kernel, {"COLUMNS": columns}) for columns in (4, 5)),
    *((cg_step.direction_kernel, {"COLUMNS": columns}) for columns in (4, 5)),
]
SCALARS = {"numel": "i32", "blocks": "i32", "partial_stride": "i32"}
SCALARS |= dict.fromkeys(("alpha", "momentum", "damping"), "fp64")
ON_DEVICE = dict.fromkeys(("partial", "state", "beta", "live", "factors", "step"), "*fp64")
PRODUCTS = ("hv", "hp", "hx")
DTYPES = [("fp64", "fp64"), ("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16")]
REGISTERS = 64


def compile_kernel(kernel, constants: dict, state: str, product: str):
    """Compile as a launch would, with aligned pointers and a length divisible by 16."""
    constants = constants | {"BLOCK": 1024 if state == "fp64" else 2048}
    signature, aligned = {}, []
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "alpha" and kernel is cg_step.advance_kernel:
            signature[name] = "*fp64"
        else:
            of_list = product if name in PRODUCTS else state
            signature[name] = SCALARS.get(name) or ON_DEVICE.get(name) or ("i32" if "stride" in name else f"*{of_list}")
        if signature[name] not in ("constexpr", "fp64") and name not in ("blocks", "partial", "partial_stride"):
            aligned.append(name)
    return compile_source(kernel, signature, constants, aligned, 8)


def compile_source(kernel, signature, constants, aligned, warps):
    position = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(position(name),): value for name, value in constants.items()},
        attrs={(position(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def check(compiled, tmp_path, registers=REGISTERS):
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = dict(part.split(":", 1) for part in report.split("Function ")[1].split() if ":" in part)
    assert usage["STACK"] == usage["LOCAL"] == "0", report
    assert int(usage["REG"]) <= registers, report


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@pytest.mark.parametrize(("kernel", "constants"), KERNELS)
def test_compiles_without_spills(kernel, constants, dtypes, tmp_path):
    compiled = compile_kernel(kernel, constants, *dtypes)
    check(compiled, tmp_path)
    assert ".v4.b32" in compiled.asm["ptx"] or ".v2.b64" in compiled.asm["ptx"], "no 16-byte accesses"


@pytest.mark.parametrize("classes", [10, 1000, 50_304])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
def test_softmax_hessian_compiles_without_spills(dtype, weighted, classes, tmp_path):
    parameters = softmax.launch_parameters(classes)
    real = "fp64" if dtype == "fp64" else "fp32"
    constants = {"WEIGHTED": weighted, "BLOCK": parameters["BLOCK"]}
    signature = {name: "i32" for name in softmax.rows_kernel.arg_names}
    signature |= {"logits": f"*{dtype}", "u": f"*{dtype}", "out": f"*{dtype}", "scale": "fp64"}
    signature |= {"weights": f"*{real}" if weighted else f"*{dtype}"} | dict.fromkeys(constants, "constexpr")
    aligned = ["logits", "u", "out", "weights"]
    if classes % 16 == 0:
        aligned += [name for name in signature if "stride" in name] + ["classes"]
    compiled = compile_source(softmax.rows_kernel, signature, constants, aligned, parameters["num_warps"])
    check(compiled, tmp_path)
    if classes % 16 == 0:
        assert ".v4.b32" in compiled.asm["ptx"] or ".v2.b64" in compiled.asm["ptx"], "no 16-byte accesses"


@pytest.mark.parametrize("units", [33, 128, 1024])
@pytest.mark.parametrize("kernel", [lstm.forward_kernel, lstm.backward_kernel, lstm.double_backward_kernel])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
def test_lstm_compiles_without_spills(dtype, kernel, units, tmp_path):
    parameters = lstm.launch_parameters(units, {"fp64": 8, "fp32": 4}.get(dtype, 2))
    constants = {"BLOCK": parameters["BLOCK"]}
    constants |= {"ACTIVATIONS": True} if "ACTIVATIONS" in kernel.arg_names else {}
    signature = {name: f"*{dtype}" for name in kernel.arg_names} | {"units": "i32", "blocks": "i32"}
    aligned = [name for name in kernel.arg_names if signature[name].startswith("*") and name not in constants]
    signature |= dict.fromkeys(constants, "constexpr")
    aligned += ["units"] if units % 16 == 0 else []
    compiled = compile_source(kernel, signature, constants, aligned, parameters["num_warps"])
    check(compiled, tmp_path)


@pytest.mark.parametrize("width", [10, 32, 256])
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("kernel", [mlp.forward_kernel, mlp.loss_kernel, mlp.backward_kernel], ids=lambda k: k.__name__)
def test_mlp_hvp_compiles_without_spills(kernel, dtype, width, tmp_path):
    parameters = mlp.launch_parameters(width)
    constants = {name: parameters.get(name, True) for name in ("BIAS", "BEND", "ENTROPY", "ROWS", "COLUMNS")}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    integers = {"rows", "n", "width", *(name for name in kernel.arg_names if name.endswith("stride"))}
    signature = {name: "i32" if name in integers else f"*{dtype}" for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr") | ({"scale": "fp64"} if "scale" in signature else {})
    # Biases start anywhere in v.
    aligned = [name for name in signature if signature[name] == f"*{dtype}" and name != "bias"]
    if width % 16 == 0:
        aligned += integers - {"rows", "n", "bias_stride"}
    compiled = compile_source(kernel, signature, constants, aligned, parameters["num_warps"])
    check(compiled, tmp_path)
    if width % 16 == 0:
        assert ".v4.b32" in compiled.asm["ptx"] or ".v2.b64" in compiled.asm["ptx"], "no 16-byte accesses"


@pytest.mark.parametrize("columns", [1, 8, 32])
@pytest.mark.parametrize("softmax_loss", [False, True], ids=["diagonal", "softmax"])
@pytest.mark.parametrize("dtypes", [("fp64", "fp64"), ("fp32", "fp32"), ("bf16", "fp32")], ids="-".join)
def test_glm_product_compiles_without_spills(dtypes, softmax_loss, columns, tmp_path):
    if softmax_loss and columns == 1:
        pytest.skip("a softmax has two classes at least")
    x, real = dtypes
    parameters = glm.launch_parameters(60_000, columns)
    warps = parameters.pop("num_warps")
    constants = {"SOFTMAX": softmax_loss, "INTERCEPT": True} | parameters
    signature = {name: "i32" for name in glm.rows_kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    signature |= {"x": f"*{x}", "weights": f"*{real}", "v": f"*{real}", "partial": f"*{real}"}
    aligned = ["x", "weights", "v", "partial", "d", "x_stride"]
    compiled = compile_source(glm.rows_kernel, signature, constants, aligned, warps)
    check(compiled, tmp_path, registers=255)
    assert "tf32" not in compiled.asm["ptx"]
    assert ".v4.b32" in compiled.asm["ptx"] or ".v2.b64" in compiled.asm["ptx"], "no 16-byte accesses"
