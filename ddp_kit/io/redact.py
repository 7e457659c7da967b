"""What is a secret, by its name or its looks, and taking it out of whatever is written."""

import re
from collections.abc import Mapping

from ddp_kit.io.logs import REDACTED as REDACTED
from ddp_kit.io.logs import without_secrets

# A name is judged by its words: any of these, or a last word of those below, as in
# `wandb_api_key` or `hfToken`.
SECRET_WORDS = {
    "password",
    "passwd",
    "passphrase",
    "secret",
    "secrets",
    "credential",
    "credentials",
    "apikey",
    "authorization",
}
SECRET_LAST_WORDS = {"key", "keys", "token", "tokens", "auth"}
# Before `token` and `key`, words of vocabularies and of sorting.
HARMLESS_BEFORE = {
    "pad",
    "eos",
    "bos",
    "unk",
    "mask",
    "sep",
    "cls",
    "max",
    "min",
    "sort",
    "group",
    "state",
    "dict",
    "cache",
}
NAMES_OF_HASHES = {
    "revision",
    "commit",
    "sha",
    "sha1",
    "sha256",
    "hash",
    "checksum",
    "digest",
    "id",
}
SECRET_TEXTS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?<![\w-])(?:sk-[\w-]{20,}|hf_[A-Za-z0-9]{30,}"
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
    r"|wandb_v1_\w{20,}|xox[abposr]-[\w-]{10,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})"
)
URL_LOGIN = re.compile(r"(?i)((?<!ssh)://)[^\s/?#]+@")
BEARER = re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}")
QUOTED = re.compile(
    r"(?i)((?:password|passwd|passphrase|secret|api_?key|access_?token|auth_?token)"
    r"['\"]?\s*[:=]\s*['\"]?)[^\s'\",;&]+"
)
ASSIGNED = re.compile(r"([\w-]+)=([^\s,;&#'\"]+)")


def redact(mapping: Mapping[str, object]) -> dict[str, object]:
    """Returns a copy without secrets.

    Secrets are values under names such as `hf_token`, texts that look like keys, logins inside
    URLs. Works through nested mappings and lists; in a list of arguments the value after
    `--hf-token` goes too. Numbers stay, except under names like `password`. A full 40-digit
    hexadecimal text is taken for a W&B key unless its name is that of a hash.
    """
    return {name: _value(value, name=name) for name, value in mapping.items()}


def _value(value: object, *, name: str) -> object:
    words = _words(name)
    if SECRET_WORDS.intersection(words):
        return _hidden(value, numbers=True)
    if is_secret(name):
        return _hidden(value, numbers=False)
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple):
        return _after_secret_flags([_value(item, name=name) for item in value])
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"[0-9a-f]{40}", value) and not NAMES_OF_HASHES.intersection(words):
        return REDACTED
    return redact_text(value)


def _after_secret_flags(arguments: list[object]) -> list[object]:
    """Takes out of a command line what stands after `--hf-token`, in place, and returns it."""
    for index, flag in enumerate(arguments[:-1]):
        is_flag = isinstance(flag, str) and flag.startswith("-") and "=" not in flag
        if is_flag and is_secret(str(flag)):
            arguments[index + 1] = REDACTED
    return arguments


def redact_text(text: str) -> str:
    """Returns the text with `[redacted]` for what looks like a secret, or is known to be one."""
    text = SECRET_TEXTS.sub(REDACTED, without_secrets(text))
    text = URL_LOGIN.sub(rf"\g<1>{REDACTED}@", text)
    text = BEARER.sub(rf"\g<1>{REDACTED}", text)
    text = QUOTED.sub(rf"\g<1>{REDACTED}", text)
    return ASSIGNED.sub(_assigned, text)


def _assigned(match: re.Match[str]) -> str:
    if is_secret(match[1]):
        return f"{match[1]}={REDACTED}"
    return match[0]


def _hidden(value: object, *, numbers: bool) -> object:
    if isinstance(value, Mapping):
        return {name: _hidden(item, numbers=numbers) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(item, numbers=numbers) for item in value]
    if value is None or value == "" or isinstance(value, bool):
        return value
    if isinstance(value, int | float) and not numbers:
        return value
    return REDACTED


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+(?![a-z])", name)]


def is_secret(name: str) -> bool:
    """Whether what stands under this name is a secret."""
    words = _words(name)
    if SECRET_WORDS.intersection(words) or words[-1:] in (["sig"], ["signature"]):
        return True
    if not words or words[-1] not in SECRET_LAST_WORDS:
        return False
    return not HARMLESS_BEFORE.intersection(words[:-1])
