"""A command's text without what differs from one start to the next."""

import re
import socket

# lines that are there or not as processes happen to run
CHANCE = re.compile(
    "|".join(
        [
            r"step \d",
            r"a stop needs up to",
            r"waiting for another process",
            r"decoded \d",
            r"\[W\d",
            r"\[rank\d+\]:\[W",
        ]
    )
)
# frames of the library in a traceback: lines move, and the names of files and functions with them
FRAME = re.compile(
    r'^\s*File "(<(root|venv|python)>[^"]*|<frozen [^"]*)", line \d+, in .*\n'
    r"(\s+.*\n)*?(?=\s*File |\S)",
    re.MULTILINE,
)
REPLACED = [
    (re.compile(r"\x1b\[[0-9;]*m"), ""),
    # a run directory that was kept names the temporary folder in which it was made
    (re.compile(r"/[^\s\"']*/same-bits-\w{8}\b"), "<temporary>"),
    # how old a checkpoint is, and the width of that column
    (re.compile(r"step +age +size"), "step age size"),
    (re.compile(r" +\d+(\.\d+)? (s|min|h|d|days?) +(?=[\d.]+ \w?iB)"), " <age> "),
    (re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "<uuid>"),
    (re.compile(r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?([.,]\d+)?(Z|[+-]\d\d:?\d\d)?"), "<time>"),
    (re.compile(r"\b20\d{6}-\d{6}(-\d+)?\b"), "<time>"),
    (re.compile(r"\b1[789]\d{8}\.\d+\b"), "<time>"),
    (re.compile(r"\b\d\d:\d\d:\d\d\b"), "<clock>"),
    # what all ranks raise, one of them says: any
    (re.compile(r"\brank \d+: (ConfigError|NonFiniteError)\b"), r"rank <any>: \1"),
    (re.compile(r"\bpid \d+"), "pid <pid>"),
    (re.compile(r"\b(port |127\.0\.0\.1:|localhost:)\d{4,5}\b"), r"\1<port>"),
    (re.compile(r"\b0x[0-9a-f]+\b"), "<address>"),
    (re.compile(r"[\d.,]+ samples/s"), "<rate> samples/s"),
    (re.compile(r"\b\d+(\.\d+)? (ms|s)(?![\w/])"), r"<duration> \2"),
]


def normalised(text: str, names: dict[str, str]) -> list[str]:
    """Returns a command's text as lines, without what differs from one start to the next."""
    for path, word in names.items():
        text = text.replace(path, word)
    text = re.sub(rf"\b{re.escape(socket.gethostname())}\b", "<host>", text)
    text = FRAME.sub("", text)
    for pattern, word in REPLACED:
        text = pattern.sub(word, text)
    return [line.rstrip() for line in text.splitlines() if not CHANCE.match(line)]
