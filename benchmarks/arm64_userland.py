"""An arm64 Debian user land without ARM hardware: extracted packages, aarch64 wheels, run by `qemu-aarch64-static`.

    python benchmarks/arm64_userland.py [FOLDER]

Needs `apt-get`, `dpkg-deb` and `pip`, but no root: the packages come from where this machine's own come from, through
a package state of its own, and are only unpacked. What was made once is left as it is.
"""

import os
import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libssl3", "libffi8", "libbz2-1.0", "liblzma5",
    "libuuid1", "libcrypt1", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib",
)  # fmt: skip
WHEELS = ("numpy==2.2.6", "onnxruntime==1.27.0")
"""Debian 12's qemu 7.2 runs the aarch64 onnxruntime from 1.20 to 1.27; 1.28 and later crash at import there."""
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")


def default_folder() -> Path:
    """Where the user land lies if nothing else is said: in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hwnas-arm64"


def apt_get(folder: Path, *words: str) -> None:
    """`apt-get` for arm64, its lists and packages in `folder`; this machine's own stay as they are."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "state/status").touch()
    options = [
        f"Dir::State={folder}/state", f"Dir::State::status={folder}/state/status", f"Dir::Cache={folder}/cache",
        "APT::Architecture=arm64", "APT::Architectures=arm64", "APT::Sandbox::User=root",
    ]  # fmt: skip
    command = ["apt-get", "-qq", *(part for option in options for part in ("-o", option)), *words]
    subprocess.run(command, cwd=folder / "cache/archives", check=True, timeout=300)


def make_userland(folder: Path) -> Path:
    """Makes the user land in a folder, or finds it there; returns its root."""
    root = folder / "root"
    if (folder / "done").exists():
        return root
    apt_get(folder, "update")
    apt_get(folder, "download", *PACKAGES)
    root.mkdir(exist_ok=True)
    for package in sorted((folder / "cache/archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, root], check=True, timeout=60)
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    target = root / "usr/lib/python3/dist-packages"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", *platforms,
         "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--target", target, *WHEELS],
        check=True, timeout=300,
    )  # fmt: skip
    (folder / "done").touch()
    return root


def python_of(root: Path) -> str:
    """The command that runs the user land's Python on this machine."""
    return f"qemu-aarch64-static -L {root} {root}/usr/bin/python3.11"


if __name__ == "__main__":
    print(python_of(make_userland(Path(sys.argv[1]).resolve() if sys.argv[1:] else default_folder())))
