#!/bin/sh
# For task definitions that name it.
exec greenroom health "$@"
