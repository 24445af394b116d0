"""``seqc bundle``: an artifact and the runtime in one archive. Needs neither torch nor onnxruntime."""

from __future__ import annotations

from pathlib import Path

import click

from seqc.cli.console import State, common_options, human_bytes, print_json
from seqc.deploy.bundle import write_bundle


@click.command("bundle")
@click.argument("directory", metavar="DIR")
@click.option("-o", "--output", required=True, metavar="FILE", help="The zip archive to write.")
@click.option("--gpu", is_flag=True, help="The wheel requires onnxruntime-gpu, not onnxruntime.")
@common_options
@click.pass_obj
def command(state: State, directory: str, output: str, gpu: bool) -> None:
    """Write the artifact DIR, the runtime as a wheel, and how to use them, to one archive."""
    names = write_bundle(directory, output, gpu)
    size = Path(output).stat().st_size
    if state.json:
        print_json({"written": output, "bytes": size, "files": names})
    else:
        click.echo(f"{output}: {len(names)} files, {human_bytes(size)}; README.md in it says how to use it")
