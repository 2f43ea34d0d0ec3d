"""Runs scripts/deploy and scripts/tenant against moto, as far as moto goes: it knows the calls and keeps
what it is told. It checks no rights, starts no container and keeps no promise about client tokens; what
it drops of a template is judged by test_rules.py."""

import concurrent.futures
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.request

import boto3

from templates import resolved

PROJECT = pathlib.Path(__file__).parent.parent.parent
REGION = "eu-west-1"


class OnMoto(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        cls.url = f"http://127.0.0.1:{port}"
        cls.log = tempfile.TemporaryFile()
        server = [sys.executable, str(PROJECT / "infra/test/moto_server.py"), "-H", "127.0.0.1", "-p", str(port)]
        cls.server = subprocess.Popen(server, stdout=cls.log, stderr=cls.log)
        cls.addClassCleanup(cls.log.close)
        cls.addClassCleanup(cls.server.wait)
        cls.addClassCleanup(cls.server.kill)
        cls.env = {
            "PATH": os.pathsep.join([str(pathlib.Path(p) / "bin") for p in sys.path if p] + [os.environ["PATH"]]),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": os.environ.get("HOME", "/"),
            "AWS_ENDPOINT_URL": cls.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_PAGER": "",
            "AWS_EC2_METADATA_DISABLED": "true",
            "POLL_SECONDS": "0.2",
            "PATIENCE_SECONDS": "60",
        }
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(cls.url + "/moto-api/", timeout=2)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        # The account as an operator prepares it.
        certificate = cls.client("acm").request_certificate(DomainName="*.sites.example.com")["CertificateArn"]
        secret = cls.client("secretsmanager").create_secret(Name="model", SecretString="canary-model")["ARN"]
        cls.run_script(
            "deploy", "--no-image", "Domain=sites.example.com", f"CertificateArn={certificate}", f"ModelSecretArn={secret}"
        )
        cls.push_image("one")

    @classmethod
    def client(cls, service):
        return boto3.client(
            service, region_name=REGION, endpoint_url=cls.url, aws_access_key_id="test", aws_secret_access_key="test"
        )

    @classmethod
    def run_script(cls, name, *args, fails=False):
        done = subprocess.run(
            [str(PROJECT / "scripts" / name), *args], env=cls.env, capture_output=True, text=True, timeout=180
        )
        # None: either is fine.
        if fails is not None and (done.returncode != 0) != fails:
            raise AssertionError(
                f"{name} {args}: status {done.returncode}\n{done.stdout}\n{done.stderr}\n{cls.last_error()}"
            )
        return done.stderr if fails else done.stdout

    @classmethod
    def last_error(cls):
        """Where moto failed, if it did: a gap of its own, most of the time."""
        cls.log.seek(0)
        log = cls.log.read().decode()
        return log[log.rfind("Traceback") :][:4000] if "Traceback" in log else ""

    @classmethod
    def push_image(cls, tag):
        manifest = json.dumps({"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json", "config": {"digest": tag}})
        cls.client("ecr").put_image(repositoryName=cls.output("RepositoryUri").split("/", 1)[1], imageManifest=manifest, imageTag=tag)

    @classmethod
    def output(cls, name, stack="greenroom"):
        [stack] = cls.client("cloudformation").describe_stacks(StackName=stack)["Stacks"]
        return {o["OutputKey"]: o["OutputValue"] for o in stack["Outputs"]}[name]

    def up(self, *args):
        return json.loads(self.run_script("tenant", "up", *args))

    def running(self, client):
        ecs, cluster = self.client("ecs"), self.output("ClusterName")
        arns = ecs.list_tasks(cluster=cluster, desiredStatus="RUNNING")["taskArns"]
        tasks = ecs.describe_tasks(cluster=cluster, tasks=arns, include=["TAGS"])["tasks"] if arns else []
        return [t["taskArn"] for t in tasks if {"key": "greenroom:client", "value": client} in t["tags"] and t["lastStatus"] != "STOPPED"]

    def targets(self, task):
        """The addresses behind the tenant's API and behind its previews."""
        stack = f"greenroom-tenant-{task['label']}"
        elb = self.client("elbv2")
        return [
            [t["Target"]["Id"] for t in elb.describe_target_health(TargetGroupArn=self.output(name, stack))["TargetHealthDescriptions"]]
            for name in ("ApiTargets", "PreviewTargets")
        ]

    def test_the_platform_is_there(self):
        resources = self.client("cloudformation").list_stack_resources(StackName="greenroom")["StackResourceSummaries"]
        made = {r["LogicalResourceId"] for r in resources}
        # moto skips in silence what it does not know; what it skips here, and nothing else, is known.
        unknown = {"LoadBalancerToApi", "LoadBalancerToPreviews", "TaskToDisk", "AlarmsPolicy", "ErrorsLogged",
                   "ManyErrors", "AnswersFail", "DiskIsBusy"}
        wanted = set(resolved("platform.yaml", {"CertificateArn": "x", "Domain": "x"}))
        self.assertEqual(wanted - made - unknown, set())
        [disk] = self.client("efs").describe_file_systems()["FileSystems"]
        self.assertTrue(disk["Encrypted"])
        self.assertEqual(len(self.client("efs").describe_mount_targets(FileSystemId=disk["FileSystemId"])["MountTargets"]), 2)
        [repository] = self.client("ecr").describe_repositories()["repositories"]
        self.assertEqual(repository["imageTagMutability"], "IMMUTABLE")
        self.run_script("deploy", "--no-image")
        self.assertEqual(self.output("FileSystemId"), disk["FileSystemId"], "a second deploy changes nothing")

    def test_one_task_for_one_tenant(self):
        # One story, because each call of the AWS CLI takes most of a second.
        first = self.up("Acme", "Memory=2048")
        self.assertEqual(self.running("Acme"), [first["task"]])
        self.assertEqual(self.targets(first), [[first["address"]], [first["address"]]])
        self.push_image("two")
        same = self.up("Acme")
        self.assertEqual(same["task"], first["task"], "it runs already, and nobody asked to replace it")
        second = self.up("Acme", "--roll")
        self.assertNotEqual(second["task"], first["task"])
        self.assertEqual(self.running("Acme"), [second["task"]])
        self.assertEqual(self.targets(second), [[second["address"]], [second["address"]]])

        # Ids that differ in case are different tenants.
        other = self.up("acme")
        self.assertNotEqual((other["label"], other["task"]), (second["label"], second["task"]))
        self.assertEqual(self.targets(other), [[other["address"]], [other["address"]]])
        points = self.client("efs").describe_access_points()["AccessPoints"]
        roots = {point["RootDirectory"]["Path"] for point in points}
        self.assertEqual(roots, {f"/clients/{first['label']}", f"/clients/{other['label']}"})
        for point in points:
            self.assertFalse(point.get("PosixUser"))
        listed = self.run_script("tenant", "list")
        self.assertIn(second["task"], listed)
        self.assertIn(other["task"], listed)

        # An address that is given out again, after a task that ended by itself, leads to its new owner.
        elb, group = self.client("elbv2"), self.output("ApiTargets", f"greenroom-tenant-{other['label']}")
        elb.register_targets(TargetGroupArn=group, Targets=[{"Id": second["address"]}])
        elb.add_tags(ResourceArns=[group], Tags=[{"Key": "greenroom:address", "Value": second["address"]}])
        self.up("Acme")
        self.assertEqual(self.targets(other)[0], [other["address"]])

        self.run_script("tenant", "down", "Acme")
        self.assertEqual(self.running("Acme"), [])
        self.assertEqual(self.targets(second), [[], []])
        self.assertEqual(self.running("acme"), [other["task"]], "nobody else's")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            both = list(pool.map(lambda _: self.run_script("tenant", "up", "Acme", fails=None), range(2)))
        self.assertEqual(len(self.running("Acme")), 1, both)

        self.run_script("tenant", "down", "acme", "--delete")
        stacks = self.client("cloudformation").list_stacks()["StackSummaries"]
        left = {stack["StackName"] for stack in stacks if stack["StackStatus"] != "DELETE_COMPLETE"}
        self.assertEqual(left, {"greenroom", f"greenroom-tenant-{first['label']}"})

    def test_bad_ids_touch_nothing(self):
        for bad in ("../x", "a b", "", "-x", "a..b"):
            self.assertIn("client's id", self.run_script("tenant", "up", bad, fails=True))

    def test_the_task_is_what_ecs_takes(self):
        """By the API, since moto's CloudFormation drops half of a task definition."""

        def api(node):
            if isinstance(node, list):
                return [api(item) for item in node]
            if not isinstance(node, dict):
                return node
            small = {"EFSVolumeConfiguration": "efsVolumeConfiguration", "FilesystemId": "fileSystemId", "IAM": "iam"}
            return {
                small.get(key, key[0].lower() + key[1:]): item if key == "Options" else api(item)
                for key, item in node.items()
            }

        parameters = {"Client": "acme", "Label": "acme-1", "FileSystemId": "fs-12345678", "Image": "r@sha256:0", "Domain": "x"}
        task = api(resolved("tenant.yaml", parameters)["Task"]["Properties"])
        # CloudFormation turns numbers into the words that the API takes here.
        task["cpu"], task["memory"] = str(task["cpu"]), str(task["memory"])
        it = task["containerDefinitions"][0]
        for pair in it["environment"]:
            pair["value"] = str(pair["value"])
        # botocore judges names and types of everything.
        kept = self.client("ecs").register_task_definition(**task)["taskDefinition"]
        [workspace] = [v for v in kept["volumes"] if v["name"] == "workspace"]
        self.assertEqual(workspace["efsVolumeConfiguration"]["transitEncryption"], "ENABLED")
        self.assertEqual(workspace["efsVolumeConfiguration"]["authorizationConfig"]["iam"], "ENABLED")
        self.assertIs(kept["containerDefinitions"][0]["readonlyRootFilesystem"], True)


if __name__ == "__main__":
    unittest.main()
