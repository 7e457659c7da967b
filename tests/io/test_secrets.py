"""A secret among the settings stands in nothing that a run leaves or says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from launching import train
from paths import KIT
from talkative import Login, Settings
from warm import TRAIN, started

from ddp_kit.checkpoint.format.layout import Manifest
from ddp_kit.checkpoint.resume import RECIPE, SEALED, binding, require_unchanged
from ddp_kit.config.secrets import secrets_of
from ddp_kit.errors import ConfigError
from ddp_kit.io.logs import hiding, without_secrets
from ddp_kit.lifecycle.resume_command import completable
from ddp_kit.settings import flatten

TALKATIVE = str(KIT / "talkative.py")
TOKEN, KEY, LOGIN = "Sesame-open/17 now", "kx7kx7kx7", "hunter2hunter2"
SECRETS = (TOKEN, "Sesame-open", KEY, LOGIN)
FLAGS = ["--token", TOKEN, f"--login.api-key={KEY}", "--source", f"https://me:{LOGIN}@host/data"]


def leaks(text: str) -> list[str]:
    return [secret for secret in SECRETS if secret in text]


def leaking_files(folder: Path) -> list[tuple[str, list[str]]]:
    found = [
        (path.name, leaks(path.read_bytes().decode(errors="replace")))
        for path in folder.rglob("*")
        if path.is_file()
    ]
    assert found
    return [(name, secrets) for name, secrets in found if secrets]


def test_nothing_that_a_failing_run_leaves_or_says_holds_a_secret(tmp_path: Path) -> None:
    (tmp_path / "given.json").write_text(json.dumps({"login": {"api_key": KEY}}))
    words = [
        *FLAGS[:2],
        *FLAGS[3:],
        "--settings",
        str(tmp_path / "given.json"),
        "--fails-at",
        "5",
        "--warns",
    ]
    command = [TALKATIVE, *words, "--run-dir", str(tmp_path / "run")]
    with started(TRAIN, *command, folder=tmp_path) as run:
        assert run.ended() == 1
        said = run.output
    assert not leaking_files(tmp_path / "run")
    assert not leaks(said)
    for kind in ("printed", "to stderr", "logged", "warned", "refused:"):
        assert (
            f"{kind} [redacted], https://host/x?t=[redacted], '[redacted]', from https://[redacted]@host/data"
            in said
        ), kind
    assert "accuracy" in said
    assert "--token '<token>'" in said
    assert (
        "ValueError: refused: [redacted]"
        in json.loads((tmp_path / "run" / "status.json").read_text())["reason"]
    )


def test_a_run_is_resumed_with_the_same_secret_and_refused_with_another_which_nobody_sees(
    tmp_path: Path,
) -> None:
    def life(*flags: str) -> Any:
        return train(*flags, folder=tmp_path, recipe=TALKATIVE, limit_s=60)

    assert life(*FLAGS, "--fails-at", "5").codes == [1, 1]
    another = life("--token", "quite-another-one", *FLAGS[2:], "--change", "fails_at")
    assert another.codes == [2, 2], another.errors
    assert re.search(r"--token +\[redacted\] +\[redacted\]\n", another.errors)
    assert not leaks(another.errors)
    assert "quite-another-one" not in another.errors
    assert life(*FLAGS, "--change", "fails_at").codes == [0, 0]


class Old:
    """A checkpoint, as far as it is asked here."""

    folder = "step-00000002"
    manifest: Manifest

    def __init__(self, settings: dict[str, str]) -> None:
        self.values = {"settings": settings}


def test_a_checkpoint_that_holds_a_secret_as_it_is_is_resumed_and_never_shown() -> None:
    """As those of before do."""
    settings = Settings(token=TOKEN, login=Login(api_key=KEY), pin_password="1234")
    new = binding(settings, recipe="f" * 64)
    clear = {name: text for name, text in flatten(settings).items() if name in new} | {
        RECIPE: "f" * 64
    }
    assert [name for name in new if new[name].startswith(SEALED)] == [
        "token",
        "label_key",
        "pin_password",
        "login.api_key",
    ]
    assert not leaks(json.dumps(new))
    assert require_unchanged(Old(clear), new, change=()) == []  # type: ignore[arg-type]  # see Old
    assert require_unchanged(Old(new), clear, change=()) == []  # type: ignore[arg-type]  # see Old
    for other in ("another", ""):
        with pytest.raises(ConfigError) as refused:
            require_unchanged(
                Old(clear),
                binding(Settings(token=other, pin_password="1234"), recipe="f" * 64),
                change=(),
            )  # type: ignore[arg-type]  # see Old
        assert "--token" in str(refused.value)
        assert not leaks(str(refused.value))


@pytest.mark.parametrize("value", ["", "1", "true", "0.1", "step", "     ", "      \n"])
def test_a_short_value_changes_no_text(value: str) -> None:
    text = "step 1: true, 0.1, and   so   on      \n"
    with hiding([value]):
        assert without_secrets(text) == text


def test_a_value_inside_of_a_longer_word_is_another_one() -> None:
    with hiding({"answer", "a.b(c)"}):
        assert (
            without_secrets("answers, answer_2, 'answer', xa.b(c), a.b(c)d")
            == "answers, [redacted]_2, '[redacted]', xa.b(c), [redacted]d"
        )
    assert without_secrets("answer") == "answer"


def test_only_secrets_are_looked_for() -> None:
    settings = Settings(
        token="tokens-value", source="https://me:pass-word@host/x", pin_password="1234567"
    )
    assert {"tokens-value", "pass-word", "1234567"} <= secrets_of(settings)
    assert not {"accuracy", "https://me:pass-word@host/x", "somebody", "ddp"} & secrets_of(settings)
    assert "recall" in secrets_of(Settings(label_key="recall"))


def test_a_command_to_type_has_gaps_where_secrets_stood() -> None:
    words = [
        "x.py",
        "--token",
        "abc",
        "--lr",
        "0.1",
        "--wandb.api-key=abc",
        "--login.hf-tokens",
        "a",
        "-1",
        "--use-auth",
        "--exact",
    ]
    gaps = ["x.py", "--token", "<token>", "--lr", "0.1", "--wandb.api-key=<wandb.api-key>"]
    assert completable(words) == [
        *gaps,
        "--login.hf-tokens",
        "<login.hf-tokens>",
        "<login.hf-tokens>",
        "--use-auth",
        "--exact",
    ]
