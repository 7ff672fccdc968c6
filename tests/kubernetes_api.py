"""An API server for kubectl on loopback. It keeps what it is given, and nothing comes of it: what a controller would
do, such as setting a JobSet's state, tests do themselves."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KINDS = {
    "v1": {"pods": "Pod", "secrets": "Secret", "serviceaccounts": "ServiceAccount", "namespaces": "Namespace",
           "persistentvolumeclaims": "PersistentVolumeClaim"},
    "jobset.x-k8s.io/v1alpha2": {"jobsets": "JobSet"},
    "argoproj.io/v1alpha1": {"workflows": "Workflow"},
    "kueue.x-k8s.io/v1beta1": {"localqueues": "LocalQueue"},
    "apiextensions.k8s.io/v1": {"customresourcedefinitions": "CustomResourceDefinition"},
    "scheduling.k8s.io/v1": {"priorityclasses": "PriorityClass"},
}  # fmt: skip
GLOBAL = ("namespaces", "priorityclasses", "customresourcedefinitions")
OBJECTS = re.compile(r"/apis?/(?:[\w.-]+/)?v\w+(?:/namespaces/(?P<space>[\w-]+))?/(?P<kind>\w+)(?:/(?P<name>[\w.-]+))?")
QUERY = [{"name": name, "in": "query"} for name in ("fieldValidation", "dryRun")]
NAMESPACE = {"group": "", "version": "v1", "kind": "Namespace"}
OPENAPI = {"paths": {"/x": {"patch": {"x-kubernetes-group-version-kind": NAMESPACE, "parameters": QUERY}}}}
"""All that kubectl looks for: whether the server checks what it is given."""


class Cluster:
    """What the server holds: (kind, name) → object."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.kinds = {version: dict(kinds) for version, kinds in KINDS.items()}
        self.add("namespaces", namespace)
        for version, kinds in KINDS.items():
            for plural, kind in kinds.items():
                group = version.rpartition("/")[0]
                self.add(
                    "customresourcedefinitions", f"{plural}.{group}", spec={"group": group, "names": {"kind": kind}}
                )
        self.hidden: set[str] = set()
        """Kinds that this user may not list."""
        self.deleted: list[tuple[str, str, dict[str, Any]]] = []
        """Kind, name and options of each deletion."""
        handler = type("Handler", (_Handler,), {"cluster": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def add(self, kind: str, name: str, **more: Any) -> None:
        version = next(version for version, kinds in KINDS.items() if kind in kinds)
        metadata = {"name": name, **more.pop("metadata", {})}
        self.objects[kind, name] = {
            "apiVersion": version, "kind": KINDS[version][kind], "metadata": metadata, **more
        }  # fmt: skip

    def kubeconfig(self) -> str:
        """That of an ordinary user, who has a context with this namespace."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": self.address}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "", "namespace": self.namespace}}],
            "current-context": "test",
        }
        return json.dumps(config)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def discover(self, path: str) -> dict[str, Any] | None:
        versions = [version for version in self.kinds if "/" in version]
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            groups = [
                {
                    "name": version.split("/")[0],
                    "versions": [{"groupVersion": version, "version": version.split("/")[1]}],
                }
                for version in versions
            ]
            return {"kind": "APIGroupList", "groups": groups}
        if path == "/openapi/v3":
            return {"paths": {"api/v1": {"serverRelativeURL": "/openapi/v3/api/v1"}}}
        if path == "/openapi/v3/api/v1":
            return OPENAPI
        version = path.removeprefix("/apis/").removeprefix("/api/")
        if version in self.kinds:
            verbs = ["create", "delete", "get", "list", "patch"]
            resources = [
                {"name": plural, "singularName": kind.lower(), "kind": kind, "namespaced": plural not in GLOBAL,
                 "verbs": verbs}
                for plural, kind in self.kinds[version].items()
            ]  # fmt: skip
            return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
        return None


class _Handler(BaseHTTPRequestHandler):
    cluster: Cluster

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        found = self.cluster.discover(url.path)
        if found is not None:
            self._answer(200, found)
            return
        match = OBJECTS.fullmatch(url.path)
        if match is None:
            self._refuse(404, "NotFound", "the server could not find the requested resource")
        elif match["name"]:
            self._one(match["kind"], match["name"])
        elif match["kind"] in self.cluster.hidden:
            self._refuse(403, "Forbidden", f"{match['kind']} is forbidden: you cannot list them")
        else:
            selector = parse_qs(url.query).get("labelSelector", [""])[0]
            items = [
                item
                for (kind, _), item in self.cluster.objects.items()
                if kind == match["kind"] and _selected(item, selector)
            ]
            self._answer(200, {"apiVersion": "v1", "kind": "List", "items": items})

    def do_POST(self) -> None:
        made = self._body()
        url = urlsplit(self.path)
        match = OBJECTS.fullmatch(url.path)
        assert match is not None
        space = match["space"]
        if space != self.cluster.namespace:
            self._refuse(404, "NotFound", f'namespaces "{space}" not found')
            return
        if "dryRun" not in parse_qs(url.query):
            self.cluster.objects[match["kind"], made["metadata"]["name"]] = made
        self._answer(201, made)

    def do_DELETE(self) -> None:
        options = self._body()
        match = OBJECTS.fullmatch(urlsplit(self.path).path)
        assert match is not None
        found = self.cluster.objects.pop((match["kind"], match["name"]), None)
        if found is None:
            self._refuse(404, "NotFound", f'{match["kind"]} "{match["name"]}" not found')
            return
        self.cluster.deleted.append((match["kind"], match["name"], options))
        self._answer(200, found)

    def _one(self, kind: str, name: str) -> None:
        found = self.cluster.objects.get((kind, name))
        if found is None:
            self._refuse(404, "NotFound", f'{kind} "{name}" not found')
        else:
            self._answer(200, found)

    def _body(self) -> dict[str, Any]:
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")

    def _refuse(self, code: int, reason: str, message: str) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": reason}
        self._answer(code, {**status, "code": code})

    def _answer(self, code: int, what: dict[str, Any]) -> None:
        text = json.dumps(what).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


def _selected(item: dict[str, Any], selector: str) -> bool:
    """By labels that must be equal."""
    labels = item["metadata"].get("labels", {})
    return all(labels.get(part.split("=")[0]) == part.split("=")[-1] for part in selector.split(",") if part)
