# shellcheck shell=bash
# What scripts/deploy and scripts/tenant share: the AWS CLI, and the words of the platform's stack.
# Sourced from the project's folder. AWS_REGION, AWS_PROFILE and so on are the AWS CLI's own.

PLATFORM="${GREENROOM_STACK:-greenroom}"

say() {
  printf '==> %s\n' "$*" >&2
}

die() {
  printf 'greenroom: %s\n' "$*" >&2
  exit 1
}

command -v aws >/dev/null 2>&1 || die "the AWS CLI is missing: see https://docs.aws.amazon.com/cli/"

# outputs STACK: its outputs, one to a line, name and value apart by a tab.
outputs() {
  aws cloudformation describe-stacks --stack-name "$1" \
    --query 'Stacks[0].Outputs[].[OutputKey,OutputValue]' --output text
}

# of NAME OUTPUTS: one of them; none or "None" is empty.
of() {
  awk -F '\t' -v name="$1" '$1 == name && $2 != "None" { print $2 }' <<<"$2"
}

# deploy_stack NAME TEMPLATE KEY=VALUE...: makes or changes it. What is not given stays as it is.
deploy_stack() {
  local name=$1 template=$2
  shift 2
  aws cloudformation deploy --stack-name "$name" --template-file "$template" \
    --capabilities CAPABILITY_IAM --no-fail-on-empty-changeset \
    ${1+--parameter-overrides "$@"} --tags "greenroom:stack=$PLATFORM" >&2
}
