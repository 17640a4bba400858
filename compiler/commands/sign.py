"""``eoracc sign``: sign the manifest of an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from eoracc.compiler.commands.common import PATH, json_option, print_json, say
from eoracc.errors import ConfigError

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["sign"]


@click.command()
@click.argument("artifact", type=PATH)
@click.option(
    "--key",
    type=PATH,
    required=True,
    metavar="FILE",
    help="The ed25519 private key (PEM, PKCS 8), as 'openssl genpkey -algorithm ed25519' makes it.",
)
@click.option("--new-key", is_flag=True, help="Make the key first, and its public key as FILE.pub.")
@json_option
def sign(artifact: Path, *, key: Path, new_key: bool, as_json: bool) -> None:
    """Sign ARTIFACT, whose bytes are compared with its manifest first.

    Writes manifest.json.sig. Users check it with --public-key. A change of the artifact, such as
    'eoracc adapter add', removes it.
    """
    from eoracc.runtime.artifact.manifest import leads_outside, verify_manifest
    from eoracc.runtime.artifact.signature import SIGNATURE_FILE, make_key
    from eoracc.runtime.artifact.update import sign_artifact

    if not leads_outside(key, artifact):
        raise ConfigError(
            f"{key}: lies in the artifact, whose users would get the private key: keep it elsewhere"
        )
    verify_manifest(artifact)  # a key is made for an artifact that can be signed only
    public_key = make_key(key) if new_key else None
    manifest_sha256 = sign_artifact(artifact, key)
    if as_json:
        print_json(
            {
                "signature": str(artifact / SIGNATURE_FILE),
                "manifest_sha256": manifest_sha256,
                "public_key": None if public_key is None else str(public_key),
            }
        )
        return
    if public_key is not None:
        say(f"made the key {key}, which stays secret, and {public_key} to publish")
    say(f"signed {artifact}: wrote {artifact / SIGNATURE_FILE}")
    say(f"manifest.json: sha256 {manifest_sha256}")
