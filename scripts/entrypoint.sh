#!/bin/sh
# For task definitions that name it: greenroom is its own entry point.
exec greenroom "${@:-serve}"
