"""Python commands forked from one process that has already imported torch, transformers and DeepSpeed.

A new interpreter spends about eight seconds of CPU time on these imports. The first caller of `start_server` starts the
process that is forked; all others, pytest-xdist workers included, connect to it. `Fork` starts a command in Python.
`FOLDER` holds executables `python` and `deepspeed` for programs that start a command themselves: launchers, the demo
and shell scripts.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
VARIABLE = "TEST_FORK_SERVER"  # holds the folder of the running server
# What the commands and many tests import. The modules of `python -m` commands themselves are imported by each process.
PRELOADED = (
    "pipeline.training.loop",
    "pipeline.training.preflight",
    "pipeline.fault_tolerance.guard",
    "pipeline.fault_tolerance.signals",
    "pipeline.config.recipe",
    "pipeline.evaluation.runner",
    "pipeline.plan.command",
    "pipeline.plan.dry_run",
    "pipeline.representations.states",
    "data_prep.convert.conversion",
    "data_prep.packing.packer",
    "data_prep.shards.verification",
    "data_prep.tokenization.tokenizer",
    "pipeline.zero3.process_group",
    "attrs",
    "datasets",
    "deepspeed.launcher.launch",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "docstring_parser",
    "matplotlib.pyplot",
    "pandas",
    "pyarrow.dataset",
    "scipy.stats",
    "setuptools",
    "sklearn.metrics",
    "torch.utils.cpp_extension",
    "torch.utils.serialization",
    "torch.utils.tensorboard",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
)
LONGEST_REQUEST = 200_000  # bytes; a Unix socket accepts no more in one message


def start_server() -> Path:
    """Start the server, unless this process or the one that started it has done so. Returns the folder."""
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    folder = tempfile.TemporaryDirectory(prefix="solar-forks-")
    atexit.register(folder.cleanup)
    root = Path(folder.name)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(root / "socket"))
    listener.listen(128)
    client = [sys.executable, "-I", "-S", str(ROOT / "tests" / "fork_client.py"), str(root / "socket")]
    deepspeed = [str(root / "python"), str(Path(sys.executable).with_name("deepspeed"))]
    for name, command in {"python": client, "python3": client, "deepspeed": deepspeed}.items():
        (root / name).write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        (root / name).chmod(0o700)
    number = listener.fileno()
    command = [sys.executable, "-m", "tests.fork_server", str(number), str(root)]
    # It ends when its standard input is closed, which this process does in any case when it ends.
    server = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.PIPE, pass_fds=[number])
    server.returncode = 0  # nobody waits for it
    _KEPT.append((folder, server))
    listener.close()
    os.environ[VARIABLE] = ENVIRONMENT[VARIABLE] = str(root)
    return root


_KEPT: list[Any] = []


class Fork:
    """`python ARGUMENTS` in the repository root, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, arguments: list[str], environment: dict[str, str], output: Path, errors: Path) -> None:
        self.output = output
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(str(start_server() / "socket"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        files = [os.open(os.devnull, os.O_RDONLY), *(os.open(path, flags, 0o600) for path in (output, errors))]
        request = {"arguments": arguments, "environment": environment, "directory": str(ROOT)}
        socket.send_fds(self._connection, [json.dumps(request).encode()], files)
        for file in files:
            os.close(file)
        self.pid = int(self._connection.recv(64))

    def poll(self) -> int | None:
        self._receive(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> None:
        self._receive(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired("python", timeout or 0, self.output.read_text())

    def communicate(self, timeout: float | None = None) -> str:
        """Wait for the end; what it wrote to `output`."""
        self.wait(timeout)
        return self.output.read_text()

    def _receive(self, timeout: float | None) -> None:
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            self.returncode = int(self._connection.recv(64) or -signal.SIGKILL)
            self._connection.close()


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork for each connection. Returns the request in the process that has to run it; the server never returns."""
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return supervise(connection)
        connection.close()


def reap_supervisors(*_: Any) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def supervise(connection: socket.socket) -> dict[str, Any]:
    """Fork again, return the request in the new process, report its id and status, and kill it without a client."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    content, files, _, _ = socket.recv_fds(connection, LONGEST_REQUEST, 3)
    if not content:
        os._exit(0)
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        return dict(json.loads(content))
    for number in (0, 1, 2, *files):
        os.close(number)
    with contextlib.suppress(ConnectionError):
        connection.send(str(pid).encode())
    end = os.pidfd_open(pid)
    if connection in select.select([end, connection], [], [])[0]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ConnectionError):
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def run(request: dict[str, Any], folder: str) -> NoReturn:
    """Run the command of a request as the interpreter would, and exit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    sys.executable = f"{folder}/python"
    arguments = list(request["arguments"])
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    while arguments[0] in ("-u", "-B"):
        unbuffered |= arguments.pop(0) == "-u"
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty(), write_through=unbuffered)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False, errors="backslashreplace")
    sys.stderr.reconfigure(line_buffering=True)
    status = 0
    try:
        run_arguments(arguments)
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        status = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    if "mpi4py.MPI" in sys.modules:
        finalize_mpi()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status & 0xFF)


def finalize_mpi() -> None:
    """Finalize MPI as mpi4py does at the end of the interpreter, which `os._exit` does not reach."""
    from mpi4py import MPI

    if MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.Finalize()


def run_arguments(arguments: list[str]) -> None:
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    first = {"-m": os.getcwd(), "-c": ""}.get(arguments[0], str(Path(arguments[0]).resolve().parent))
    sys.path[0:1] = [first, *paths]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        main = type(sys)("__main__")
        main.__builtins__ = __builtins__  # type: ignore[attr-defined]
        sys.modules["__main__"] = main
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def main() -> NoReturn:
    """Import, then serve until the process that started the server has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, reap_supervisors)
    listener = socket.socket(fileno=int(sys.argv[1]))
    folder = sys.argv[2]
    for name in PRELOADED:
        import_module(name)
    from pipeline.zero3.initialize import import_muon_uncompiled

    import_muon_uncompiled()
    gc.collect()
    gc.freeze()  # a collection in a forked process would otherwise visit, and copy, everything imported
    run(serve(listener), folder)


if __name__ == "__main__":
    main()
