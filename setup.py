"""Packaging: what is installed, what it needs, and the console command.

The five run-time dependencies carry lower bounds only, so that minray fits into the
environment of whoever uses it.  What developers and CI run with is pinned, in
requirements.txt.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """`minray.__version__`, read without importing: the dependencies may not be there yet."""
    source = (HERE / "minray" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__(?:: \w+)? = "([^"]+)"', source, re.MULTILINE)
    if found is None:
        raise SystemExit('setup.py: minray/__init__.py has no line of the form __version__ = "1.2.3"')
    return found[1]


def readme() -> str:
    path = HERE / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


EXAMPLES = ["gymnasium>=1.0", "matplotlib>=3.7", "scikit-learn>=1.3"]
OUTSIDE = [  # Libraries that use Ray and do without it unless asked; more of them: tests/test_outside.py.
    "econml>=0.15",
    "modin>=0.32",
    "pymoo>=0.6.1.5",
    "sf-hamilton>=1.80",
    "sktime>=0.30",
]
TEST = [
    "dask>=2024.12",
    "hypothesis>=6.90",
    "ipykernel>=6.25",
    "mypy>=1.10",
    "nbclient>=0.9",
    "psutil>=5.9",
    "pytest>=8",
    "pytest-timeout>=2.2",
    "ruff>=0.6",
]

setup(
    name="minray",
    version=version(),
    description="Ray's tasks, actors and shared-memory objects: starts in a blink, read in an afternoon",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["minray", "minray.*"]),
    py_modules=["minray_pytest"],
    package_data={"minray": ["py.typed", "schema.sql", "as_ray/path/*/*"]},
    python_requires=">=3.10",
    install_requires=[
        "cloudpickle>=3.0",  # the first to pickle by value what Python 3.12 and 3.13 compile
        "numpy>=1.22",
        "paramiko>=3.4",
        "sqlite-utils>=3.35",
        "tqdm>=4.64",
    ],
    extras_require={"examples": EXAMPLES, "outside": OUTSIDE, "test": TEST},
    entry_points={
        "console_scripts": ["minray=minray.command:main"],
        "pytest11": ["minray_pytest=minray_pytest"],  # one name, so that `-p minray_pytest` is the same plugin
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
)
