from setuptools import setup

# kernels/ lies beside the package in the repository and inside it when installed: it is only ever extraopt.kernels
setup(
    packages=["extraopt", "extraopt.checkpoints", "extraopt.integrations", "extraopt.kernels"],
    package_dir={"extraopt": "extraopt", "extraopt.kernels": "kernels"},
    package_data={"extraopt": ["py.typed"]},
)
