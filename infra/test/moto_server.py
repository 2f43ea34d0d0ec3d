"""moto's server with its gaps filled that our templates meet (measured with moto 5.2.5)."""

import ipaddress
import itertools
import sys

from moto.cloudformation import parsing
from moto.cloudformation.models import ChangeSet
from moto.cloudformation.responses import CloudFormationResponse
from moto.ec2.models.elastic_network_interfaces import NetworkInterface
from moto.ecs.models import TaskDefinition
from moto.efs.models import AccessPoint, FileSystem
from moto.moto_api import state_manager
from moto.server import main

# CloudFormation's Ref and GetAtt of a disk and of an access point.
AccessPoint.physical_resource_id = property(lambda self: self.access_point_id)
AccessPoint.get_cfn_attribute = lambda self, name: {
    "Arn": self.access_point_arn,
    "AccessPointId": self.access_point_id,
}[name]
FileSystem.get_cfn_attribute = lambda self, name: {
    "Arn": self.file_system_arn,
    "FileSystemId": self.file_system_id,
}[name]
# run_task asks the network interface for it.
if not hasattr(NetworkInterface, "private_dns_name"):
    NetworkInterface.private_dns_name = ""


# CloudFormation's Cidr.
def clean_json(node, resources, as_it_was=parsing.clean_json):
    if isinstance(node, dict) and list(node) == ["Fn::Cidr"]:
        block, count, bits = as_it_was(node["Fn::Cidr"], resources)
        subnets = ipaddress.ip_network(block).subnets(new_prefix=32 - int(bits))
        return [str(subnet) for subnet in itertools.islice(subnets, int(count))]
    return as_it_was(node, resources)


parsing.clean_json = clean_json


# Names of image repositories are lower case.
def generate_resource_name(kind, *args, as_it_was=parsing.generate_resource_name):
    name = as_it_was(kind, *args)
    return name.lower() if kind == "AWS::ECR::Repository" else name


parsing.generate_resource_name = generate_resource_name


# A change set that changes nothing fails later, in a way that the AWS CLI knows.
CloudFormationResponse._validate_different_update = lambda *_: None

# A change set, which is what `aws cloudformation deploy` makes, forgets conditions and outputs.
def apply(self):
    stack = self.stack
    if self.change_set_type == "UPDATE":
        stack.update(self.template, self.role_arn, self.parameters, self.tags)
        return
    stack.template, stack.template_dict = self.template, self.template_dict
    stack.parameters, stack.tags = self.parameters, self.tags or {}
    stack.resource_map = stack._create_resource_map()
    stack.output_map = stack._create_output_map()
    stack.resource_map.create(stack.template_dict)
    # What was not given is known from here on, or the next change set takes it for a change.
    known = stack.template_dict.get("Parameters", {}).items()
    stack.parameters = {k: str(v["Default"]) for k, v in known if "Default" in v} | self.parameters
    stack.resource_map.input_parameters = stack.parameters


ChangeSet.apply = apply


# A task definition of CloudFormation's has no network of its own, and so its tasks no address.
def with_network(as_it_was):
    def make(*args, **kwargs):
        definition = as_it_was(*args, **kwargs)
        definition.network_mode = "awsvpc"
        return definition

    return make


TaskDefinition.create_from_cloudformation_json = with_network(TaskDefinition.create_from_cloudformation_json)
TaskDefinition.update_from_cloudformation_json = with_network(TaskDefinition.update_from_cloudformation_json)

# A task runs until it is stopped; else each look at it would bring it a step nearer to its end.
state_manager.set_transition("ecs::task", {"progression": "manual", "times": 1_000_000})

main(sys.argv[1:])
