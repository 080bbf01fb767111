"""Stand-in for the interpreter: `fork_client.py SOCKET ARGUMENTS` runs `python ARGUMENTS` as a fork of the server.

Passes on the working directory, the environment, standard input and output, signals and the exit status. See
`tests.fork_server`.
"""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    address, arguments = sys.argv[1], sys.argv[2:]
    options = [argument for argument in arguments[:3] if argument not in ("-u", "-B")]
    if not options or (options[0].startswith("-") and options[0] not in ("-m", "-c")):
        os.execv(sys.executable, [sys.executable, *arguments])  # -I, -V and the like need a new interpreter
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    request = {"arguments": arguments, "environment": dict(os.environ), "directory": os.getcwd()}
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    pid = int(connection.recv(64))
    for number in FORWARDED:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    status = int(connection.recv(64) or 1)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


main()
