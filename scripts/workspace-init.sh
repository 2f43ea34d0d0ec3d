#!/bin/sh
# For task definitions that name it: nothing is left to do.
echo "workspace-init.sh: greenroom makes a workspace at its first init (POST /api/init)" >&2
