"""Prepares Fashion-MNIST as TFDS would, from Debian's package instead of its authors' server.

    python .ci/prepare_fashion_mnist.py DATA_DIR

Takes about three minutes the first time and nothing after that. TensorFlow, which only preparing
needs, goes into a virtual environment of its own that is removed at the end. Where there is no
`apt-get` it says so and ends well: the tests that read the set are then skipped. Anything else that
fails, fails.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import venv

PACKAGE = "dataset-fashion-mnist"
INSTALLED = pathlib.Path("/usr/share/datasets/fashion-mnist")
REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def main(data_dir: pathlib.Path) -> None:
    if list(data_dir.glob("fashion_mnist/*/dataset_info.json")):
        print(f"Fashion-MNIST is prepared in {data_dir}")
        return
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        work.chmod(0o755)  # apt downloads as a user of its own
        files = get_files(work)
        if files is None:
            return
        venv.create(work / "venv", with_pip=True)
        python = work / "venv" / "bin" / "python"
        # It is used once: compiling it all to byte code would take longer than it saves.
        run(python, "-m", "pip", "install", "--quiet", "--no-compile", f"{REPOSITORY}[tfds]")
        run(python, __file__, "--prepare", files, data_dir)


def get_files(work: pathlib.Path) -> pathlib.Path | None:
    """The folder with the four files as published, or None where there is no apt."""
    if INSTALLED.is_dir():
        return INSTALLED
    if shutil.which("apt-get") is None:
        print("Fashion-MNIST is not prepared: there is no apt-get here. Its tests are skipped.")
        return None
    if os.geteuid() == 0:
        run("apt-get", "-qq", "update")
        run("apt-get", "-qq", "install", "-y", "--no-install-recommends", PACKAGE)
        return INSTALLED
    # Not root: the package can be unpacked, if the machine knows of it, though not installed.
    if subprocess.run(["apt-get", "-qq", "download", PACKAGE], cwd=work).returncode:
        print(f"Fashion-MNIST is not prepared: as root, `apt-get install {PACKAGE}`. "
              "Its tests are skipped.")  # fmt: skip
        return None
    run("dpkg-deb", "-x", *work.glob("*.deb"), work / "package")
    return work / "package" / INSTALLED.relative_to("/")


def prepare(files: pathlib.Path, data_dir: pathlib.Path) -> None:
    """Puts the files where TFDS looks before it downloads; `load` then prepares the set."""
    import tensorflow_datasets as tfds
    from etils import epath
    from tensorflow_datasets.core.download import resource

    import advmeta

    downloads = epath.Path(data_dir) / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    builder = tfds.builder("fashion_mnist", data_dir=data_dir, file_format="array_record")
    for url, info in builder.url_infos.items():
        # Under the registered checksum, which is that of the gzip file of 2017. Debian compressed
        # the same images anew.
        target = downloads / resource.get_dl_fname(url, info.checksum)
        shutil.copyfile(files / info.filename, target)
        resource.write_info_file(
            url=url, path=target, dataset_name=builder.name, original_fname=info.filename,
            url_info=info,
        )  # fmt: skip
    fashion = advmeta.data.load("fashion_mnist", data_dir=data_dir, train_examples=1)
    print(f"Fashion-MNIST is now prepared in {data_dir}: {len(fashion.test.y)} test images")


def run(*command: str | pathlib.Path) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    environment.pop("PYTHONPATH", None)
    subprocess.run([str(word) for word in command], check=True, env=environment)


if __name__ == "__main__":
    if sys.argv[1] == "--prepare":
        prepare(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
    else:
        main(pathlib.Path(sys.argv[1]).expanduser().absolute())
