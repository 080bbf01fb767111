"""Exit statuses of all commands; docs/operations.md lists them for users and slurm/lib.sh acts on them."""

USER_ERROR = 2  # bad input, settings or environment: one line on standard error, nothing to gain from a restart
STOPPED_BY_SIGNAL = 75  # EX_TEMPFAIL of sysexits.h: state saved after USR1 or TERM; start again to resume
RANK_FAILURE = 76  # a rank hung or was lost; start again to resume
