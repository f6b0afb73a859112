import os
import sys

from setuptools import Extension, setup

# The wheel for all platforms carries no machine code, and Windows has no pthreads: torch operations do the same there.
PURE = os.environ.get("EXTRAOPT_PURE") == "1" or sys.platform == "win32"

# kernels/ lies beside the package in the repository and inside it when installed: it is only ever extraopt.kernels
setup(
    packages=["extraopt", "extraopt.tools", "extraopt.tools.checkpoints", "extraopt.integrations", "extraopt.kernels"],
    package_dir={"extraopt": "extraopt", "extraopt.kernels": "kernels"},
    package_data={"extraopt": ["py.typed"]},
    ext_modules=[
        Extension(
            "extraopt.kernels._native",
            ["kernels/native.c"],
            optional=True,  # without a C compiler torch operations do the same
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread"],
            py_limited_api=True,  # it knows nothing of Python
        )
    ]
    * (not PURE),
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if not PURE else {},
)
