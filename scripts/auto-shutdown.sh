#!/bin/sh
# For task definitions that name it: nothing is left to do.
echo "auto-shutdown.sh: greenroom stops itself when idle (AUTO_SHUTDOWN_MINUTES)" >&2
