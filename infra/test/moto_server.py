"""moto's server with its gaps filled that our templates meet (measured with moto 5.2.5)."""

import sys

from moto.ec2.models.elastic_network_interfaces import NetworkInterface
from moto.efs.models import AccessPoint, FileSystem
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

main(sys.argv[1:])
