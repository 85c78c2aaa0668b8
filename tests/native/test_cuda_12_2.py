"""The kernels use nothing newer than CUDA 12.2 has; graphs/plugin/tests/cuda_12_2.sh compiles them with what it has."""

from __future__ import annotations

import re

from tests.native.kernels import PLUGIN

# Instructions by the version of PTX that brought them; CUDA 12.2 has 8.2. Of SM 80, but for barrier.cluster, bulk
# copies, fences, griddepcontrol, mapa, mbarrier, setmaxnreg and wgmma, of SM 90.
INSTRUCTIONS = {
    "barrier.cluster.arrive.aligned": 7.8,
    "barrier.cluster.wait.aligned": 7.8,
    "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes": 8.0,
    "cp.async.cg.shared.global": 7.0,
    "cp.async.commit_group": 7.0,
    "cp.async.wait_all": 7.0,
    "cp.async.wait_group": 7.0,
    "ex2.approx.ftz.f32": 1.4,
    "fence.mbarrier_init.release.cluster": 8.0,
    "fence.proxy.async.shared::cta": 8.0,
    "griddepcontrol.launch_dependents": 7.8,
    "griddepcontrol.wait": 7.8,
    "ld.global.nc.L1::no_allocate.v4.u32": 7.4,
    "ld.global.cg.f32": 2.0,
    "ld.global.cg.v4.f32": 2.0,
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16": 6.5,
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16": 6.5,
    "mapa.u64": 7.8,
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": 7.0,
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": 7.0,
    "mbarrier.arrive.expect_tx.shared::cta.b64": 8.0,
    "mbarrier.arrive.shared::cta.b64": 7.8,
    "mbarrier.init.shared::cta.b64": 7.8,
    "mbarrier.try_wait.parity.shared::cta.b64": 7.8,
    "nanosleep.u32": 6.3,
    "selp.u32": 1.0,
    "setmaxnreg.dec.sync.aligned.u32": 8.0,
    "setmaxnreg.inc.sync.aligned.u32": 8.0,
    "setp.ne.b32": 1.0,
    "wgmma.commit_group.sync.aligned": 8.0,
    "wgmma.fence.sync.aligned": 8.0,
    "wgmma.mma_async.sync.aligned.m64n80k16.f32..": 8.0,
    "wgmma.wait_group.sync.aligned": 8.0,
}
CUDA_12_2 = 8.2
# Calls of the runtime by the version of CUDA that brought them.
CALLS = {
    "cudaDeviceGetAttribute": 2.2,
    "cudaFuncGetAttributes": 1.0,
    "cudaFuncSetAttribute": 9.0,
    "cudaGetDevice": 1.0,
    "cudaGetDriverEntryPoint": 11.3,
    "cudaGetLastError": 1.0,
    "cudaLaunchKernelEx": 11.8,
    "cudaOccupancyMaxActiveClusters": 11.8,
}
HEADERS = {"cuda.h", "cuda_bf16.h", "cuda_fp16.h", "cuda_runtime_api.h"}


def sources() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((PLUGIN / "kernels").iterdir())}


def test_instructions_are_of_ptx_8_2_or_older() -> None:
    found: set[str] = set()
    for text in sources().values():
        text = re.sub(r"\\\n", " ", text)  # lines of a macro
        for literals in re.findall(r"\basm(?:\s+volatile)?\s*\(\s*((?:\"[^\"]*\"(?:\s*#?[a-z]\w*)?\s*)+)", text):
            assembly = "".join(re.findall(r"\"([^\"]*)\"", literals)).replace("\\n", " ")
            statements = (statement.strip("{} ") for statement in assembly.split(";"))
            found |= {one.split()[0] for one in statements if one and not one.startswith(".reg")}
    assert found == set(INSTRUCTIONS)
    assert max(INSTRUCTIONS.values()) <= CUDA_12_2


def test_calls_and_headers_are_of_cuda_12_2_or_older() -> None:
    text = re.sub(r"#if CUDART_VERSION >= 13000\n.*?#else\n", "", "\n".join(sources().values()), flags=re.DOTALL)
    assert set(re.findall(r"\b(cuda[A-Z]\w*)\(", text)) == set(CALLS)
    assert max(CALLS.values()) <= 12.2
    assert set(re.findall(r"#include <(cuda\w*\.h|cooperative_groups\S*|mma\.h|cuda/\S+)>", text)) == HEADERS
    assert not re.search(r"__cluster_dims__|__cvta_|cuda::|__nv_fp[468]", text.replace("__cvta_generic_to_shared", ""))
