"""Without a GPU, the kernels run under Triton's interpreter."""

import tests.triton_interpreter  # noqa: F401
