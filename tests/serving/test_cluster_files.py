"""The files of configs/serving/ are what Ray Serve, KubeRay and the application expect."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import yaml
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from vita_audio.serving import cluster
from vita_audio.serving.cluster import Plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "serving"


def deployed_by(file: Path) -> dict:
    """What ``serve deploy`` reads of a file."""
    content = yaml.safe_load(file.read_text())
    is_kubernetes = content.get("kind") == "RayService"
    return yaml.safe_load(content["spec"]["serveConfigV2"]) if is_kubernetes else content


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_the_configuration_files_are_what_ray_and_the_application_expect(file):
    content = deployed_by(file)
    (described,) = ServeDeploySchema.model_validate(content).applications
    assert described.import_path == "vita_audio.serving.cluster:application"
    plan = Plan.model_validate(described.args)
    assert plan.server.host == content["http_options"]["host"]
    assert plan.server.on_loopback or plan.server.api_key_file
    built = build_app(cluster.application(plan), name="vita-audio")
    assert [deployment.name for deployment in built.deployments] == ["replica", "gateway"]
    config = built.deployments[0]._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas) == (plan.scale.replicas, plan.scale.most_replicas)


# The fields of each part that may be used: KubeRay's API ray.io/v1, and Kubernetes' v1.
FIELDS = {
    "service": {"serveConfigV2", "rayClusterConfig", "serveService", "upgradeStrategy"},
    "cluster": {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"},
    "head": {"serviceType", "headService", "rayStartParams", "template"},
    "group": {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"},
    "pod": {"containers", "initContainers", "volumes", "nodeSelector", "tolerations", "imagePullSecrets"},
    "container": {"name", "image", "imagePullPolicy", "env", "ports", "resources", "volumeMounts", "securityContext"},
}  # fmt: skip


def test_the_kubernetes_file_has_the_structure_of_a_ray_service():
    file = CONFIGS / "kuberay.yaml"
    content = yaml.safe_load(file.read_text())
    assert (content["apiVersion"], content["kind"]) == ("ray.io/v1", "RayService")
    assert content["spec"].keys() <= FIELDS["service"]
    spec = content["spec"]["rayClusterConfig"]
    assert spec.keys() <= FIELDS["cluster"]
    assert spec["rayVersion"] == ray.__version__
    assert spec["headGroupSpec"].keys() <= FIELDS["head"]
    (group,) = spec["workerGroupSpecs"]
    assert group.keys() <= FIELDS["group"]
    plan = Plan.model_validate(deployed_by(file)["applications"][0]["args"])
    assert group["minReplicas"] == group["replicas"] == plan.scale.replicas
    assert group["maxReplicas"] == plan.scale.most_replicas
    for part in (spec["headGroupSpec"], group):
        assert all(isinstance(value, str) for value in part["rayStartParams"].values())
        pod = part["template"]["spec"]
        assert pod.keys() <= FIELDS["pod"]
        (container,) = pod["containers"]
        assert container.keys() <= FIELDS["container"]
        assert container["resources"].keys() == {"limits", "requests"}
        mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
        used = [plan.model_name_or_path, plan.codec.audio_tokenizer_path, plan.server.api_key_file]
        assert all(any(Path(path).is_relative_to(mount) for mount in mounts.values()) for path in used)
    gpus = group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == plan.scale.gpus_per_replica
