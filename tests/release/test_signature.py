"""An export that its sender has signed: whose signature holds, of what, and what is said where it does not."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from jobs import Jobs, Run
from private_runs import edit, private_run, whole_export

from dpdist.errors import InputError
from dpdist.release.signature import SIGNATURE, sign
from dpdist.release.verify import verify
from dpdist_launch.cli import main


def new_key(folder: Path, name: str, *, passphrase: str = "") -> Path:
    key = folder / name
    made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", f"{name} of the test", "-f", str(key)]
    subprocess.run(made, check=True)
    return key


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return new_key(tmp_path, "alice")


@pytest.fixture
def export(tmp_path: Path, key: Path) -> Path:
    made = whole_export(private_run(tmp_path / "run"), tmp_path / "export")
    sign(made, key)
    return made


def refusal(export: Path, signer: Path) -> str:
    """What is wrong with the signature; empty where nothing is."""
    found = verify(export, signer=signer)
    (told,) = [check for check in found["checks"] if check["check"] == "signature"]
    assert told["holds"] == (not told["wrong"])
    return " ".join(told["wrong"])


def test_a_signature_holds_for_its_key_and_replaces_the_senders_word(export: Path, key: Path) -> None:
    public = key.with_suffix(".pub")
    assert refusal(export, public) == ""
    found = verify(export, signer=public)
    assert found["holds"]
    trusted = found["on_trust"]
    assert any("the key of --signer" in item for item in trusted)
    assert not any("--expect" in item for item in trusted)
    unasked = verify(export)
    assert unasked["holds"]  # whoever has no key checks what can be checked
    assert any("--signer" in item for item in unasked["on_trust"])


def test_anybody_with_openssh_can_check_it_without_dpdist(export: Path) -> None:
    command = ["ssh-keygen", "-Y", "check-novalidate", "-n", "dpdist-export", "-s", str(export / SIGNATURE)]
    told = subprocess.run(command, stdin=(export / "privacy.json").open(), capture_output=True, text=True, check=True)
    assert "Good" in told.stdout


def test_another_key_another_statement_or_no_signature_is_refused(export: Path, key: Path, tmp_path: Path) -> None:
    public = key.with_suffix(".pub")
    assert "no signature of privacy.json" in refusal(export, new_key(tmp_path, "mallory").with_suffix(".pub"))
    # One that the same key made of another export, or of a file that is no export's.
    other = whole_export(private_run(tmp_path / "other", sigma=3.0), tmp_path / "other-export")
    (other / SIGNATURE).write_bytes((export / SIGNATURE).read_bytes())
    assert "no signature of privacy.json" in refusal(other, public)
    (other / SIGNATURE).unlink()
    command = ["ssh-keygen", "-q", "-Y", "sign", "-n", "file", "-f", str(key), str(other / "privacy.json")]
    subprocess.run(command, check=True, capture_output=True)
    assert "no signature of privacy.json" in refusal(other, public)
    (other / SIGNATURE).unlink()
    assert f"there is no {SIGNATURE}" in refusal(other, public)
    # A statement that was changed after it was signed.
    edit(export / "privacy.json", dataset_size=2000)
    assert "no signature of privacy.json" in refusal(export, public)


def test_what_is_no_signature_or_no_key_is_named(export: Path, key: Path, tmp_path: Path) -> None:
    public = key.with_suffix(".pub")
    (export / SIGNATURE).write_bytes(b"\x00nonsense")
    assert "no signature of privacy.json" in refusal(export, public)
    for text in ("", "nonsense", public.read_text() * 2, "cert-authority ssh-ed25519 AAAA\n* ssh-ed25519 AAAA", "\x00"):
        (tmp_path / "bad.pub").write_text(text)
        with pytest.raises(InputError, match="is no public SSH key"):
            verify(export, signer=tmp_path / "bad.pub")
    with pytest.raises(InputError, match="is no public SSH key"):
        verify(export, signer=key)  # the private part
    (export / SIGNATURE).unlink()
    for bad, why in ((public.with_name("none"), "is no file"), (export / "model.json", "could not sign")):
        with pytest.raises(InputError, match=why):
            sign(export, bad)
        assert not (export / SIGNATURE).exists()


def test_without_openssh_it_is_said(export: Path, key: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="OpenSSH"):
        verify(export, signer=key.with_suffix(".pub"))


def test_a_run_is_exported_signed_or_not_at_all(
    single: Run, jobs: Jobs, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(single.root), "--without-guarantee", "--to"]
    ended = jobs.command(*words, str(tmp_path / "unsigned"), "--sign", str(tmp_path / "nothing")).wait()
    assert ended.code == 2
    assert "--sign" in ended.err
    assert not (tmp_path / "unsigned").exists()
    assert jobs.command(*words, str(tmp_path / "signed"), "--sign", str(key)).wait().code == 0
    assert (tmp_path / "signed" / SIGNATURE).stat().st_mode & 0o777 == 0o644
    main(["verify", str(tmp_path / "signed"), "--signer", str(key.with_suffix(".pub")), "--json"])
    checks = {check["check"]: check["holds"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["signature"]
    assert checks["files"]
