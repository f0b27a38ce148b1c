"""Conventions that respected implementations do not share: what differs, in a sentence. The witness tests assert each of them.

A difference that is not in this table is a failure of a witness test.
"""

from __future__ import annotations

# (format and rule, format and rule, what the second does differently): test_witness_formats.py plants every bf16 value in both
FORMATS = (
    ("mxfp4:ocp", "mxfp4", "floor clips what lies above 6 * scale, ceil of amax / 6 never clips"),
    ("mxfp4:ocp", "mxfp4:even", "EVEN goes up from mantissa 1.75, which E2M1 would round to 8"),
    ("mxfp4:ocp", "mxfp4:torchao_ceil", "CEIL goes up unless amax is a power of two"),
    ("mxfp4:triton_down_v1", "mxfp4:ocp", "floor of amax / 6 is a binade lower below mantissa 1.5"),
    ("mxfp8:ocp", "mxfp8", "floor clips what lies above 448 * scale, ceil of amax / 448 never clips"),
    ("mxfp8:ocp", "mxfp8:compressed_tensors", "rounds amax to one mantissa bit"),
    ("mxfp8:ocp", "mxfp8:even", "rounds amax to three mantissa bits"),
    ("mxfp4:triton_up", "mxfp4:linear", "ties go to the lower magnitude, -0.0 loses its sign"),
    ("mxfp4:triton_up", "mxfp4:triton_away", "ties go away from zero"),
    ("nvfp4", "nvfp4:torchao", "block scales of at least 2**-6"),
    ("nvfp4", "nvfp4:compressed_tensors", "a zero scale becomes 0.125"),
    ("nvfp4", "nvfp4:modelopt", "zero blocks: 1.0; underflow: zeros are 0 / 0"),
    ("nvfp4", "nvfp4:vllm", "blocks whose scale rounds to 0 get codes 0, not +-6"),
    ("nvfp4", "nvfp4:fast", "such blocks have zeros of code 7: 0 * inf"),
)

# (routing rule, what another implementation does): test_witness_routing.py
ROUTING = (
    ("renormalize", "a softmax taken first underflows in float32, and the next best expert is lost"),
    ("minimax2", "without the guard of 1e-20 sigmoids that vanish give 0 / 0"),
    ("renormalize", "onnxruntime gives equal logits to the higher index"),
    ("renormalize", "onnxruntime turns a NaN logit into weights of zero"),
    ("default", "onnxruntime turns an infinite logit into weights of zero"),
)

# (library, what it does): test_witness_formats.py
LIBRARIES = (
    ("ml_dtypes", "overflow and inf become NaN instead of the largest value; NaN in E2M1 is -0 or 0"),
    ("ml_dtypes", "E8M0 is rounded to nearest, and 0 or a negative becomes NaN"),
    ("compressed-tensors", "its FP4 cast drops the sign of -0.0, though not of a negative that rounds to 0"),
)
