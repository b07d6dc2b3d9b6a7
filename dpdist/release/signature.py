"""Who vouches for an export: a signature of its statement by an SSH key, made and checked by OpenSSH's `ssh-keygen`.

The statement has the SHA-256 of every other file, so its signature covers all of the export. Whoever has no dpdist can
check it too: `ssh-keygen -Y check-novalidate -n dpdist-export -s privacy.json.sig < privacy.json` names the key.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from dpdist.errors import InputError
from dpdist.release.exported import PRIVACY

SIGNATURE = f"{PRIVACY}.sig"
#: What these signatures are for: one that the key has made of something else is none of an export.
_NAMESPACE = "dpdist-export"
_PUBLIC_KEY = re.compile(r"^((?:ssh|ecdsa|sk)-[\w@.-]+ [A-Za-z0-9+/]+=*)(?: .*)?$")
#: Seconds for a check; a signature may wait for a passphrase or for a touch of a hardware key.
_PATIENCE = 60


def sign(export: Path, key: Path) -> None:
    """Write the signature of an export's statement beside it. May ask for a passphrase, on the terminal.

    Args:
        key: a private SSH key, or the public one of a key that the agent holds.

    Raises:
        InputError: there is no such key, or it cannot sign.
    """
    if not key.is_file():
        raise InputError("--sign", str(key), "is no file; name an SSH key, such as ~/.ssh/id_ed25519.")
    command = ["-Y", "sign", "-n", _NAMESPACE, "-f", str(key), str(export / PRIVACY)]
    if said := _ssh_keygen(command, field="--sign"):
        raise InputError("--sign", str(key), f"could not sign ({said}); name a private SSH key of yours.")


def public_key(signer: Path) -> str:
    """The key in a `.pub` file, without its comment.

    Raises:
        InputError: it is no such file.
    """
    try:
        lines = [line for line in signer.read_text().splitlines() if line.strip() and not line.startswith("#")]
    except (OSError, UnicodeDecodeError):
        lines = []
    found = _PUBLIC_KEY.match(lines[0]) if len(lines) == 1 else None
    if found is None:
        remedy = "is no public SSH key; name the sender's .pub file, of one line as `ssh-ed25519 AAAA... name`."
        raise InputError("--signer", str(signer), remedy)
    return found[1]


def refused(export: Path, key: str) -> str | None:
    """Why the export's signature is none by this public key; None where it is one.

    Raises:
        InputError: there is no `ssh-keygen`.
    """
    signature = export / SIGNATURE
    if signature.is_symlink() or not signature.is_file():
        return f"there is no {SIGNATURE}: it was not signed, or the signature was taken away"
    with tempfile.TemporaryDirectory() as folder:
        allowed = Path(folder) / "allowed"
        allowed.write_text(f'sender namespaces="{_NAMESPACE}" {key}\n')
        command = ["-Y", "verify", "-f", str(allowed), "-I", "sender", "-n", _NAMESPACE, "-s", str(signature)]
        said = _ssh_keygen(command, field="--signer", of=export / PRIVACY)
    return f"{SIGNATURE} is no signature of {PRIVACY} by the key of --signer ({said})" if said else None


def _ssh_keygen(arguments: list[str], *, field: str, of: Path | None = None) -> str:
    """Run it, on the content of the file `of`; its last words where it fails, otherwise nothing."""
    try:
        done = subprocess.run(
            ["ssh-keygen", *arguments],
            input=b"" if of is None else of.read_bytes(),
            capture_output=True,
            timeout=_PATIENCE,
            check=False,
        )
    except FileNotFoundError:
        remedy = (
            "needs OpenSSH's ssh-keygen (8.1 or newer), which is not on this machine's PATH; install openssh-client."
        )
        raise InputError(field, "ssh-keygen", remedy) from None
    except subprocess.TimeoutExpired:
        return f"no answer within {_PATIENCE} s"
    lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
    return "" if done.returncode == 0 else (lines or [f"exit code {done.returncode}"])[-1]
