"""The rules that the templates have to keep, one test for each. cfn-lint has judged the form."""

import json
import re
import unittest

from templates import read, resolved

SECRET = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:"
TENANT = {
    "Client": "Acme",
    "Label": "acme-0123456789ab",
    "Image": "r@sha256:" + "0" * 64,
    "RepositoryArn": "arn:aws:ecr:eu-west-1:123456789012:repository/greenroom",
    "FileSystemId": "fs-1",
    "LogGroup": "/greenroom/greenroom",
    "LogGroupArn": "arn:aws:logs:eu-west-1:123456789012:log-group:/greenroom/greenroom",
    "Domain": "sites.example.com",
    "ModelSecretArn": SECRET + "model",
    "GitSecretArn": SECRET + "git",
}
PLATFORM = {"Domain": "sites.example.com", "CertificateArn": "arn:aws:acm:x:y:certificate/z"}


def tenant(**other):
    return resolved("tenant.yaml", TENANT | other)


def platform(**other):
    return resolved("platform.yaml", PLATFORM | other)


def of_type(resources, kind):
    return {name: it["Properties"] for name, it in resources.items() if it["Type"] == kind}


def container(resources):
    [container] = resources["Task"]["Properties"]["ContainerDefinitions"]
    return container


def statements(role):
    return [s for policy in role["Properties"]["Policies"] for s in policy["PolicyDocument"]["Statement"]]


def as_list(value):
    return value if isinstance(value, list) else [value]


class TheTask(unittest.TestCase):
    def test_its_root_is_read_only(self):
        for road in ("uid", "landlock"):
            self.assertIs(container(tenant(Road=road))["ReadonlyRootFilesystem"], True)

    def test_where_it_writes_is_mounted(self):
        task = tenant()["Task"]["Properties"]
        mounted = {m["SourceVolume"]: m["ContainerPath"] for m in container(tenant())["MountPoints"]}
        self.assertEqual({v["Name"] for v in task["Volumes"]}, set(mounted))
        self.assertEqual(set(mounted.values()), {"/workspace", "/tmp", "/var/cache/greenroom", "/home/greenroom"})

    def test_on_the_uid_road_it_keeps_six_capabilities(self):
        default = {  # Fargate's, of which one can only drop
            "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE",
            "NET_RAW", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
        }
        it = container(tenant(Road="uid"))
        self.assertEqual(it["User"], "0:0")
        kept = default - set(it["LinuxParameters"]["Capabilities"]["Drop"])
        self.assertEqual(kept, {"SETUID", "SETGID", "KILL", "CHOWN", "DAC_OVERRIDE", "FOWNER"})
        self.assertNotIn("Add", it["LinuxParameters"]["Capabilities"])

    def test_on_the_other_road_it_keeps_none_and_is_nobody(self):
        it = container(tenant(Road="landlock"))
        self.assertEqual(it["User"], "1000:1000")
        self.assertEqual(it["LinuxParameters"]["Capabilities"], {"Drop": ["ALL"]})

    def test_nothing_is_privileged_or_stands_before_our_pid_1(self):
        it = container(tenant())
        self.assertNotIn("Privileged", it)
        self.assertIs(it["LinuxParameters"]["InitProcessEnabled"], False)

    def test_what_fargate_refuses_is_not_asked_for(self):
        self.assertLessEqual(set(container(tenant())["LinuxParameters"]), {"InitProcessEnabled", "Capabilities"})
        task = tenant()["Task"]["Properties"]
        self.assertEqual((task["NetworkMode"], task["RequiresCompatibilities"]), ("awsvpc", ["FARGATE"]))

    def test_secrets_come_by_reference_alone(self):
        it = container(tenant())
        names = {secret["Name"] for secret in it["Secrets"]}
        self.assertEqual(
            names, {"ANTHROPIC_API_KEY", "GREENROOM_API_TOKEN", "CLAUDE_SERVICE_SECRET", "GITHUB_TOKEN"}
        )
        for pair in it["Environment"]:
            self.assertNotRegex(pair["Name"], "KEY|TOKEN|SECRET|PASSWORD")
        without = container(tenant(GitSecretArn=""))
        self.assertNotIn("GITHUB_TOKEN", {secret["Name"] for secret in without["Secrets"]})

    def test_the_image_is_named_by_its_digest(self):
        pattern = read("tenant.yaml")["Parameters"]["Image"]["AllowedPattern"]
        self.assertIsNone(re.match(pattern, "greenroom:latest"))
        self.assertIsNotNone(re.match(pattern, TENANT["Image"]))

    def test_it_serves_one_client_alone(self):
        self.assertIn({"Name": "CLIENT_ID", "Value": "Acme"}, container(tenant())["Environment"])

    def test_turns_have_time_to_end(self):
        it = container(tenant())
        values = {pair["Name"]: pair["Value"] for pair in it["Environment"]}
        self.assertEqual(it["StopTimeout"], 120)
        self.assertEqual(values["STOP_TIMEOUT_SECONDS"], "120")
        self.assertLess(int(values["DRAIN_SECONDS"]), 120)

    def test_its_health_is_asked_for(self):
        self.assertEqual(container(tenant())["HealthCheck"]["Command"], ["CMD", "/usr/local/bin/greenroom", "health"])

    def test_logs_never_stop_it(self):
        self.assertEqual(container(tenant())["LogConfiguration"]["Options"]["mode"], "non-blocking")

    def test_every_variable_is_a_setting_of_ours(self):
        table = (__import__("templates").FOLDER.parent / "src/config/table.rs").read_text()
        it = container(tenant(RepoUrl="https://x/y", MonthlyBudgetUsd="5", ControlPlaneUrl="https://x"))
        for pair in it["Environment"] + it["Secrets"]:
            self.assertIn(f"    {pair['Name']}, ", table)


class TheDisk(unittest.TestCase):
    def test_each_client_sees_its_own_folder_alone(self):
        it = tenant()
        self.assertEqual(it["Folder"]["Properties"]["RootDirectory"]["Path"], "/clients/acme-0123456789ab")
        [volume] = [v for v in it["Task"]["Properties"]["Volumes"] if v["Name"] == "workspace"]
        configuration = volume["EFSVolumeConfiguration"]
        self.assertEqual(configuration["AuthorizationConfig"], {"AccessPointId": "<Folder>", "IAM": "ENABLED"})
        self.assertNotIn("RootDirectory", configuration)

    def test_it_travels_encrypted(self):
        [volume] = [v for v in tenant()["Task"]["Properties"]["Volumes"] if v["Name"] == "workspace"]
        self.assertEqual(volume["EFSVolumeConfiguration"]["TransitEncryption"], "ENABLED")
        policy = platform()["Disk"]["Properties"]["FileSystemPolicy"]["Statement"]
        self.assertTrue(
            any(s["Effect"] == "Deny" and s["Condition"] == {"Bool": {"aws:SecureTransport": "false"}} for s in policy)
        )

    def test_it_is_encrypted_backed_up_and_kept(self):
        disk = platform()["Disk"]
        self.assertIs(disk["Properties"]["Encrypted"], True)
        self.assertEqual(disk["Properties"]["BackupPolicy"], {"Status": "ENABLED"})
        self.assertEqual((disk["DeletionPolicy"], disk["UpdateReplacePolicy"]), ("Retain", "Retain"))

    def test_nobody_mounts_it_but_by_an_access_point(self):
        policy = platform()["Disk"]["Properties"]["FileSystemPolicy"]["Statement"]
        denied = [s for s in policy if s["Effect"] == "Deny" and "Null" in s["Condition"]]
        self.assertEqual(denied[0]["Condition"], {"Null": {"elasticfilesystem:AccessPointArn": "true"}})
        for s in policy:
            if s["Effect"] == "Allow":
                self.assertNotEqual(s["Principal"], {"AWS": "*"})

    def test_identities_are_forced_on_the_landlock_road_alone(self):
        uid, landlock = tenant(Road="uid")["Folder"], tenant(Road="landlock")["Folder"]
        self.assertNotIn("PosixUser", uid["Properties"])
        self.assertEqual(landlock["Properties"]["PosixUser"], {"Uid": "1000", "Gid": "1000"})

    def test_its_port_is_open_to_tasks_alone(self):
        [rule] = platform()["DiskGroup"]["Properties"]["SecurityGroupIngress"]
        self.assertEqual((rule["FromPort"], rule["ToPort"]), (2049, 2049))
        self.assertEqual(rule["SourceSecurityGroupId"], "<TaskGroup>")


class Rights(unittest.TestCase):
    def test_the_task_may_mount_its_own_folder_and_nothing_else(self):
        for road, actions in (("uid", 3), ("landlock", 2)):
            [statement] = statements(tenant(Road=road)["TaskRole"])
            self.assertEqual(len(statement["Action"]), actions)
            for action in statement["Action"]:
                self.assertRegex(action, "^elasticfilesystem:Client(Mount|Write|RootAccess)$")
            self.assertTrue(statement["Resource"].endswith("file-system/fs-1"))
            condition = statement["Condition"]["StringEquals"]["elasticfilesystem:AccessPointArn"]
            self.assertTrue(condition.endswith("access-point/<Folder>"))
            self.assertNotIn("ManagedPolicyArns", tenant(Road=road)["TaskRole"]["Properties"])

    def test_only_the_login_of_ecr_has_no_resource(self):
        for statement in statements(tenant()["ExecutionRole"]):
            if statement["Resource"] == "*":
                self.assertEqual(statement["Action"], "ecr:GetAuthorizationToken")
        self.assertNotIn("ManagedPolicyArns", tenant()["ExecutionRole"]["Properties"])

    def test_no_right_has_a_star(self):
        for role in ("TaskRole", "ExecutionRole"):
            for statement in statements(tenant()[role]):
                for action in as_list(statement["Action"]):
                    self.assertNotIn("*", action)

    def test_the_start_reads_the_secrets_of_this_tenant_alone(self):
        [statement] = [s for s in statements(tenant()["ExecutionRole"]) if s.get("Sid") == "ReadSecrets"]
        self.assertEqual(
            statement["Resource"], ["<ApiToken>", "<ServiceSecret>", SECRET + "model", SECRET + "git"]
        )

    def test_logs_are_written_below_its_own_name(self):
        [statement] = [s for s in statements(tenant()["ExecutionRole"]) if s.get("Sid") == "Log"]
        self.assertTrue(statement["Resource"].endswith(":log-stream:acme-0123456789ab/*"))

    def test_only_ecs_of_this_account_takes_the_roles(self):
        for role in ("TaskRole", "ExecutionRole"):
            [trust] = tenant()[role]["Properties"]["AssumeRolePolicyDocument"]["Statement"]
            self.assertEqual(trust["Principal"], {"Service": "ecs-tasks.amazonaws.com"})
            self.assertEqual(trust["Condition"]["StringEquals"], {"aws:SourceAccount": "123456789012"})

    def test_nobody_gets_a_shell(self):
        everything = json.dumps([read("platform.yaml"), read("tenant.yaml")], default=str)
        for word in ("ssmmessages", "EnableExecuteCommand", "ExecuteCommandConfiguration"):
            self.assertNotIn(word, everything)


class Secrets(unittest.TestCase):
    def test_each_tenant_has_its_own_made_by_the_service(self):
        made = of_type(tenant(), "AWS::SecretsManager::Secret")
        self.assertEqual(set(made), {"ApiToken", "ServiceSecret"})
        for secret in made.values():
            self.assertGreaterEqual(secret["GenerateSecretString"]["PasswordLength"], 32)
            self.assertNotIn("SecretString", secret)

    def test_no_parameter_holds_one(self):
        for name in ("platform.yaml", "tenant.yaml"):
            for parameter in read(name)["Parameters"]:
                if re.search("Secret|Token|Key|Password", parameter):
                    self.assertTrue(parameter.endswith("Arn"), parameter)

    def test_no_output_holds_one(self):
        for name in ("platform.yaml", "tenant.yaml"):
            self.assertNotIn("resolve:secretsmanager", json.dumps(read(name), default=str))


class TheNetwork(unittest.TestCase):
    def test_tasks_hear_the_load_balancer_alone(self):
        rules = platform()["TaskGroup"]["Properties"]["SecurityGroupIngress"]
        self.assertEqual(sorted(rule["FromPort"] for rule in rules), [4321, 8080])
        for rule in rules:
            self.assertEqual(rule["FromPort"], rule["ToPort"])
            self.assertEqual(rule["SourceSecurityGroupId"], "<LoadBalancerGroup>")

    def test_ways_out_are_named(self):
        for name, group in of_type(platform(InterfaceEndpoints="true"), "AWS::EC2::SecurityGroup").items():
            self.assertTrue(group["SecurityGroupEgress"], name)
            for rule in group["SecurityGroupEgress"]:
                if rule["CidrIp"] == "0.0.0.0/0":
                    self.assertEqual((name, rule["FromPort"], rule["ToPort"]), ("TaskGroup", 443, 443))

    def test_people_come_by_tls(self):
        it = platform()
        self.assertEqual(it["Https"]["Properties"]["Protocol"], "HTTPS")
        self.assertIn("TLS13", it["Https"]["Properties"]["SslPolicy"])
        [action] = it["Http"]["Properties"]["DefaultActions"]
        self.assertEqual(action["RedirectConfig"]["Protocol"], "HTTPS")
        ports = [rule["FromPort"] for rule in it["LoadBalancerGroup"]["Properties"]["SecurityGroupIngress"]]
        self.assertEqual(sorted(ports), [80, 443])

    def test_unknown_names_lead_nowhere(self):
        [action] = platform()["Https"]["Properties"]["DefaultActions"]
        self.assertEqual(action["FixedResponseConfig"]["StatusCode"], "404")

    def test_the_load_balancer_is_strict_and_patient_with_websockets(self):
        attributes = {
            a["Key"]: a["Value"] for a in platform()["LoadBalancer"]["Properties"]["LoadBalancerAttributes"]
        }
        self.assertEqual(attributes["routing.http.drop_invalid_header_fields.enabled"], "true")
        self.assertEqual(attributes["routing.http.desync_mitigation_mode"], "strictest")
        self.assertEqual(attributes["routing.http.preserve_host_header.enabled"], "true")
        self.assertGreater(int(attributes["idle_timeout.timeout_seconds"]), 60)

    def test_a_tenants_names_lead_to_its_own_targets(self):
        it = tenant()
        for rule, host, targets in (
            ("ApiRule", "api.acme-0123456789ab.sites.example.com", "<ApiTargets>"),
            ("PreviewRule", "*.acme-0123456789ab.sites.example.com", "<PreviewTargets>"),
        ):
            [condition] = it[rule]["Properties"]["Conditions"]
            self.assertEqual(condition["HostHeaderConfig"]["Values"], [host])
            self.assertEqual(it[rule]["Properties"]["Actions"][0]["TargetGroupArn"], targets)

    def test_without_nat_tasks_have_their_way_out(self):
        with_nat, without = platform(), platform(NatGateway="false")
        self.assertIn("TaskDefaultByNat", with_nat)
        self.assertNotIn("TaskDefaultByGateway", with_nat)
        self.assertIn("TaskDefaultByGateway", without)
        self.assertNotIn("Nat", without)

    def test_an_existing_network_is_left_alone(self):
        made = {it["Type"] for it in platform(VpcId="vpc-1").values()}
        for kind in ("VPC", "Subnet", "RouteTable", "NatGateway", "InternetGateway", "VPCEndpoint"):
            self.assertNotIn(f"AWS::EC2::{kind}", made)


class TheRest(unittest.TestCase):
    def test_images_are_scanned_and_never_replaced(self):
        repository = platform()["Repository"]["Properties"]
        self.assertEqual(repository["ImageScanningConfiguration"], {"ScanOnPush": True})
        self.assertEqual(repository["ImageTagMutability"], "IMMUTABLE")
        rules = json.loads(repository["LifecyclePolicy"]["LifecyclePolicyText"])["rules"]
        self.assertEqual(len(rules), 2)

    def test_logs_are_encrypted_and_end(self):
        logs = platform()["Logs"]["Properties"]
        self.assertEqual(logs["KmsKeyId"], "<Key.Arn>")
        self.assertEqual(logs["RetentionInDays"], 30)

    def test_the_key_rotates(self):
        self.assertIs(platform()["Key"]["Properties"]["EnableKeyRotation"], True)

    def test_every_alarm_is_heard(self):
        alarms = of_type(platform(), "AWS::CloudWatch::Alarm")
        self.assertGreaterEqual(len(alarms), 3)
        for name, alarm in alarms.items():
            self.assertEqual(alarm["AlarmActions"], ["<Alarms>"], name)
        self.assertEqual(platform()["TaskFailed"]["Properties"]["Targets"][0]["Arn"], "<Alarms>")
        self.assertIn("AlarmsByMail", platform(AlarmEmail="a@example.com"))

    def test_every_parameter_has_its_sentence(self):
        for name in ("platform.yaml", "tenant.yaml"):
            for parameter, about in read(name)["Parameters"].items():
                self.assertGreater(len(about.get("Description", "")), 10, parameter)


if __name__ == "__main__":
    unittest.main()
