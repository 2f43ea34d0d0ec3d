"""Reads our templates, as plain data or as CloudFormation would resolve them."""

import pathlib

import cfnlint.decode

FOLDER = pathlib.Path(__file__).parent.parent
NOTHING = object()


def read(name):
    template, problems = cfnlint.decode.decode(str(FOLDER / name))
    assert not problems, problems
    return template


def resolved(name, parameters):
    """The resources that these parameters make, with Ref, Sub, If, Join and Select resolved as far as
    they can be: what only AWS knows becomes "<Resource>" or "<Resource.Attribute>"."""
    template = read(name)
    known = {key: value.get("Default", "") for key, value in template["Parameters"].items()}
    known |= {
        "AWS::Region": "eu-west-1",
        "AWS::AccountId": "123456789012",
        "AWS::Partition": "aws",
        "AWS::URLSuffix": "amazonaws.com",
        "AWS::StackName": "greenroom",
    }
    known |= parameters

    def holds(condition):
        [(operator, operands)] = condition.items()
        if operator == "Fn::Equals":
            return value(operands[0]) == value(operands[1])
        if operator == "Fn::Not":
            return not holds(operands[0])
        if operator == "Fn::And":
            return all(holds(operand) for operand in operands)
        return holds(template["Conditions"][operands])  # Condition

    def sub(text):
        out, rest = "", text
        while "${" in rest:
            before, rest = rest.split("${", 1)
            name, rest = rest.split("}", 1)
            out += before + str(value({"Ref": name}))
        return out + rest

    def value(node):
        if isinstance(node, list):
            return [item for item in map(value, node) if item is not NOTHING]
        if not isinstance(node, dict):
            return node
        if len(node) == 1:
            [(function, operand)] = node.items()
            if function == "Ref":
                if operand == "AWS::NoValue":
                    return NOTHING
                return known.get(operand, f"<{operand}>")
            if function == "Fn::GetAtt":
                return "<" + (operand if isinstance(operand, str) else ".".join(operand)) + ">"
            if function == "Fn::Sub":
                return sub(operand)
            if function == "Fn::If":
                return value(operand[1] if holds(template["Conditions"][operand[0]]) else operand[2])
            if function == "Fn::Select":
                return f"<select {operand[0]}>"
            if function.startswith("Fn::"):
                return f"<{function}>"
        pairs = ((key, value(item)) for key, item in node.items())
        return {key: item for key, item in pairs if item is not NOTHING}

    return {
        key: {"Type": resource["Type"], **value({k: v for k, v in resource.items() if k != "Type"})}
        for key, resource in template["Resources"].items()
        if "Condition" not in resource or holds(template["Conditions"][resource["Condition"]])
    }
