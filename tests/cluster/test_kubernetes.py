"""The manifests are what Kubernetes accepts, also once the overlays are laid over the base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cluster.servers import DEPLOY

KUBERNETES = DEPLOY / "kubernetes"
BASE = sorted(path for path in (KUBERNETES / "base").glob("*.yaml") if path.name != "kustomization.yaml")
VERSION = "1.34"


def _merged(base: Any, patch: Any) -> Any:
    """Lays a patch over a manifest, as kustomize does: lists of named things by their names."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {key: _merged(base.get(key), value) for key, value in patch.items()}
    if isinstance(base, list) and isinstance(patch, list) and all("name" in one for one in [*base, *patch]):
        found = {one["name"]: one for one in base}
        return list((found | {one["name"]: _merged(found.get(one["name"]), one) for one in patch}).values())
    return copy.deepcopy(patch)


@pytest.mark.parametrize("path", BASE, ids=lambda path: path.stem)
def test_the_base_is_valid(path: Path) -> None:
    kubernetes_validate.validate(yaml.safe_load(path.read_text()), VERSION, strict=True)


def test_the_overlay_for_gpus_is_valid() -> None:
    base = yaml.safe_load((KUBERNETES / "base/deployment.yaml").read_text())
    merged = _merged(base, yaml.safe_load((KUBERNETES / "gpu/deployment.yaml").read_text()))
    kubernetes_validate.validate(merged, VERSION, strict=True)
    (container,) = merged["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1" and container["readinessProbe"]


def test_a_wrong_manifest_is_found() -> None:
    manifest = yaml.safe_load((KUBERNETES / "base/deployment.yaml").read_text())
    manifest["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_pods_run_without_rights() -> None:
    spec = yaml.safe_load((KUBERNETES / "base/deployment.yaml").read_text())["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    own = container["securityContext"]
    assert spec["securityContext"]["runAsNonRoot"] and own["readOnlyRootFilesystem"]
    assert not own["allowPrivilegeEscalation"] and own["capabilities"]["drop"] == ["ALL"]
    assert not spec["automountServiceAccountToken"]
