"""What the Hugging Face Hub of the tests answers: one method an endpoint, models only, over Git LFS and without Xet.

Statuses, headers and error codes are those that `huggingface_hub` looks at, as the real Hub sends them.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any
from urllib.parse import parse_qs, quote

from tests.hub_repos import Answer, Blob, Commit, HubError, Repo, Request, Store, card_data


class Hub(Store):
    # Repositories

    def whoami(self, request: Request) -> Answer:
        if (token := request.token) is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": org, "fullname": org, "roleInOrg": "write"} for org in token.orgs]
        access = {"displayName": "test", "role": token.role, "createdAt": "2026-01-01T00:00:00.000Z"}
        user = {"type": "user", "id": token.user, "name": token.user, "fullname": token.user, "orgs": orgs}
        return Answer({**user, "auth": {"type": "access_token", "accessToken": access}})

    def create_repo(self, request: Request) -> Answer:
        wanted, token = request.json(), self.check_write(request.token, None)
        name = f"{wanted.get('organization') or token.user}/{wanted['name']}"
        if wanted.get("type", "model") != "model":
            raise HubError(400, "only models live here")
        if not self.member(token, name):
            raise HubError(403, f"You don't have the rights to create a model under the namespace of {name}")
        url = f"{self.url}/{name}"
        if name in self.repos:
            return Answer({"error": "You already created this model repo", "url": url}, 409)
        self.create(name, wanted.get("visibility") == "private" or wanted.get("private") is True)
        return Answer({"url": url, "name": name, "id": name})

    def move_repo(self, request: Request) -> Answer:
        wanted = request.json()
        request.values["name"], new = wanted["fromRepo"], wanted["toRepo"]
        repo = self.open(request, "write")
        self.check_write(request.token, new)
        if new in self.repos:
            raise HubError(409, f"{new} already exists")
        self.moved[repo.name] = new
        self.moved.pop(new, None)
        self.repos[new] = self.repos.pop(repo.name)
        repo.name = new
        return Answer({})

    def auth_check(self, request: Request) -> Answer:
        self.open(request, "write" if request.path.endswith("/write") else "read")
        return Answer({})

    def info(self, request: Request) -> Answer:
        repo = self.open(request)
        commit = repo.find(request.values.get("revision", "main"))
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        for sibling in siblings if request.flag("blobs") else ():
            blob = commit.files[sibling["rfilename"]]
            sibling |= {"size": blob.size, "blobId": blob.oid}
            if blob.sha256:
                sibling["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": blob.pointer}
        readme = commit.files.get("README.md")
        card = (card_data(self.contents[readme.key].decode()) if readme else None) or {}
        data: dict[str, Any] = {"sha": commit.oid, "lastModified": commit.date, "createdAt": repo.commits[0].date}
        data |= {"private": repo.private, "gated": "auto" if repo.gated else False, "disabled": False}
        data |= {"author": repo.name.split("/")[0], "siblings": siblings}
        data |= {"cardData": card, "tags": card["tags"] if isinstance(card.get("tags"), list) else []}
        if expand := request.query.get("expand"):
            data = {key: data[key] for key in expand if key in data}
        return Answer({"_id": repo.name, "id": repo.name, "modelId": repo.name, **data})

    def entry(self, commit: Commit, path: str) -> dict[str, Any] | None:
        """A file or a folder as lists show it."""
        if blob := commit.files.get(path):
            lfs = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": blob.pointer}} if blob.sha256 else {}
            return {"type": "file", "oid": blob.oid, "size": blob.size, "path": path, **lfs}
        inside = sorted((name, blob.oid) for name, blob in commit.files.items() if name.startswith(f"{path}/"))
        oid = hashlib.sha1(json.dumps(inside).encode()).hexdigest()
        return {"type": "directory", "oid": oid, "size": 0, "path": path} if inside else None

    def tree(self, request: Request) -> Answer:
        commit = self.open(request).find(request.values["revision"])
        folder = (request.values.get("path") or "").strip("/")
        inside = [path for path in commit.files if path.startswith(f"{folder}/" if folder else "")]
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist on this revision", "EntryNotFound")
        paths, depth = set(), folder.count("/") + 2 if folder else 1
        for path in inside:
            parts = path.split("/")
            last = len(parts) if request.flag("recursive") else depth
            paths |= {"/".join(parts[:n]) for n in range(depth, last + 1)}
        return Answer([self.entry(commit, path) for path in sorted(paths)])

    def paths_info(self, request: Request) -> Answer:
        commit = self.open(request).find(request.values["revision"])
        paths = parse_qs(request.body.decode()).get("paths", [])
        return Answer([entry for path in paths if (entry := self.entry(commit, path))])

    def commits(self, request: Request) -> Answer:
        def row(commit: Commit) -> dict[str, Any]:
            shown = {"title": commit.title, "message": commit.message, "date": commit.date}
            return {"id": commit.oid, "authors": [{"user": commit.author}], **shown}

        history = self.open(request).history(request.values["revision"])
        return Answer([row(commit) for commit in history])

    def refs(self, request: Request) -> Answer:
        repo = self.open(request)
        kinds = {"heads": "branches", "tags": "tags", "convert": "converts", "pr": "pullRequests"}
        rows: dict[str, list[dict[str, str]]] = {kind: [] for kind in kinds.values()}
        for ref, oid in repo.refs.items():
            _, kind, name = ref.split("/", 2)
            rows[kinds[kind]].append({"name": ref if kind == "pr" else name, "ref": ref, "targetCommit": oid})
        return Answer(rows)

    def branch_or_tag(self, request: Request) -> Answer:
        repo, wanted, named = self.open(request, "write"), request.json(), request.values["revision"]
        branch = "/branch/" in request.path
        name, start = (named, wanted.get("startingPoint", "main")) if branch else (wanted.get("tag", named), named)
        ref = f"refs/{'heads' if branch else 'tags'}/{name}"
        if name.startswith("refs/"):
            raise HubError(400, f"Invalid reference for a {'branch' if branch else 'tag'}: {name}")
        if request.method == "DELETE":
            if ref == "refs/heads/main":
                raise HubError(403, "main cannot be deleted")
            if repo.refs.pop(ref, None) is None:
                raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
            return Answer({})
        if ref in repo.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.find(start).oid
        return Answer({})

    # Upload

    def validate_yaml(self, request: Request) -> Answer:
        try:
            empty = card_data(request.json()["content"]) is None
        except HubError as error:
            return Answer({"errors": [{"message": json.loads(error.answer.body)["error"]}], "warnings": []}, 400)
        warnings = [{"message": "empty or missing yaml metadata in repo card"}] if empty else []
        return Answer({"errors": [], "warnings": warnings})

    def preupload(self, request: Request) -> Answer:
        repo = self.open(request, "propose" if request.flag("create_pr") else "write")
        now, files = repo.find(request.values["revision"]).files, []
        kept = self.contents[now[".gitignore"].key].decode() if ".gitignore" in now else ""
        ignored = request.json().get("gitIgnore", kept).split()
        for file in request.json()["files"]:
            lfs = self.in_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
            known = {"oid": now[file["path"]].key} if file["path"] in now else {}
            ignore = any(fnmatch(file["path"], pattern) for pattern in ignored)
            mode = {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": ignore}
            files.append({"path": file["path"], **mode, **known})
        return Answer({"files": files})

    def lfs_batch(self, request: Request) -> Answer:
        wanted = request.json()
        repo = self.open(request, "write" if "ref" in wanted else "propose")
        multipart = self.part_size is not None and "multipart" in wanted.get("transfers", [])
        objects = []
        for item in wanted["objects"]:
            objects.append({"oid": item["oid"], "size": item["size"]})
            if item["oid"] in repo.lfs:
                continue  # without actions: it is here already
            href, header = f"{self.storage_url}/lfs/{repo.name}/{item['oid']}", {}
            if multipart and self.part_size and item["size"] > self.part_size:
                count = -(-item["size"] // self.part_size)
                header = {"chunk_size": str(self.part_size), **{str(n): f"{href}/{n}" for n in range(1, count + 1)}}
                href = f"{self.url}/lfs/{repo.name}/{item['oid']}"
            verify = {"href": f"{self.url}/{repo.name}.git/info/lfs/objects/verify"}
            objects[-1]["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
        return Answer({"transfer": "multipart" if multipart else "basic", "objects": objects})

    def lfs_put(self, request: Request) -> Answer:
        self.check_signed(request)
        name, oid, part = request.values["name"], request.values["oid"], request.values.get("part")
        etag = f'"{hashlib.md5(request.body).hexdigest()}"'
        if part:
            self.parts.setdefault((name, oid), {})[int(part)] = request.body
        else:
            self.receive(name, oid, request.body)
        return Answer(b"", ETag=etag)

    def check_signed(self, request: Request) -> None:
        """An address of the storage carries its right in itself, and a token beside it is refused, as by S3."""
        if request.token is not None:
            raise HubError(400, "Only one auth mechanism allowed")

    def lfs_complete(self, request: Request) -> Answer:
        name, oid = request.values["name"], request.values["oid"]
        parts, content = self.parts.pop((name, oid), {}), b""
        for part in request.json()["parts"]:
            piece = parts.get(part["partNumber"], b"")
            if part["etag"] != f'"{hashlib.md5(piece).hexdigest()}"':
                raise HubError(400, f"InvalidPart: {part}")
            content += piece
        self.receive(name, oid, content)
        return Answer({})

    def receive(self, name: str, oid: str, content: bytes) -> None:
        if (found := hashlib.sha256(content).hexdigest()) != oid:
            raise HubError(400, f"the content's sha256 is {found}, not {oid}")
        self.contents[oid] = content
        self.repos[name].lfs.add(oid)

    def lfs_verify(self, request: Request) -> Answer:
        repo, wanted = self.open(request, "propose"), request.json()
        if wanted["oid"] not in repo.lfs or len(self.contents[wanted["oid"]]) != wanted["size"]:
            raise HubError(404, f"{wanted['oid']} was not uploaded")
        return Answer({})

    def commit(self, request: Request) -> Answer:
        pull, revision = request.flag("create_pr"), request.values["revision"]
        repo = self.open(request, "propose" if pull or revision.startswith("refs/pr/") else "write")
        assert request.token is not None
        base, ref = repo.find(revision), repo.ref(revision)
        if ref is None or ref.startswith("refs/tags/"):
            raise HubError(400, f"{revision} is not a branch")
        header, *operations = [json.loads(line) for line in request.body.split(b"\n") if line]
        title, parent = header["value"]["summary"], header["value"].get("parentCommit")
        if parent and not base.oid.startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for operation in operations:
            self.apply(repo, files, operation["key"], operation["value"])
        url = {}
        if pull:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            ref, url = f"refs/pr/{number}", {"pullRequestUrl": f"{self.url}/{repo.name}/discussions/{number}"}
            repo.refs[ref] = base.oid
        made = repo.add(ref, files, title, header["value"].get("description", ""), request.token.user)
        location = {"commitOid": made.oid, "commitUrl": f"{self.url}/{repo.name}/commit/{made.oid}"}
        return Answer({"success": True, "hookOutput": "", **location, **url})

    def apply(self, repo: Repo, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"])
            if path == "README.md":
                card_data(content.decode())
            files[path] = self.keep(content)
        elif key == "lfsFile":
            if value["oid"] not in repo.lfs:
                pointer = "Your push was rejected because an LFS pointer pointed to a file that does not exist"
                raise HubError(400, f"{pointer}. Offending file: - {path}")
            files[path] = self.keep(self.contents[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = f"{path.rstrip('/')}/" if key == "deletedFolder" else None
            gone = [name for name in files if name == path or (folder and name.startswith(folder))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"unknown operation {key}")

    # Download

    def resolve(self, request: Request) -> Answer:
        repo = self.open(request, "read")
        commit, path = repo.find(request.values["revision"]), request.values["path"]
        if (blob := commit.files.get(path)) is None:
            raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        linked = {"X_Repo_Commit": commit.oid, "X_Linked_Size": str(blob.size), "X_Linked_ETag": f'"{blob.key}"'}
        if blob.sha256 is None:
            return self.content(request, blob.key, **linked)
        location = f"{self.storage_url}/cdn/{repo.name}/{blob.sha256}?filename={quote(path, safe='')}"
        return Answer(b"Found", 302, Location=location, **linked)

    def cdn(self, request: Request) -> Answer:
        self.check_signed(request)
        return self.content(request, request.values["oid"])

    def content(self, request: Request, key: str, **headers: str) -> Answer:
        body = self.contents[key]
        headers |= {"ETag": f'"{key}"', "Accept_Ranges": "bytes", "Content_Type": "application/octet-stream"}
        if not (found := re.fullmatch(r"bytes=(\d*)-(\d*)", request.range or "")):
            return Answer(body, **headers)
        first = int(found[1]) if found[1] else max(0, len(body) - int(found[2]))
        last = min(int(found[2]), len(body) - 1) if found[1] and found[2] else len(body) - 1
        if first > last:
            return Answer(b"", 416, Content_Range=f"bytes */{len(body)}", **headers)
        return Answer(body[first : last + 1], 206, Content_Range=f"bytes {first}-{last}/{len(body)}", **headers)


NAME = r"(?P<name>[^/]+/[^/]+)"
MODEL = rf"/api/models/{NAME}"
REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[[Hub, Request], Answer]]] = [
    ("GET", "/api/whoami-v2", Hub.whoami),
    ("POST", "/api/repos/create", Hub.create_repo),
    ("POST", "/api/repos/move", Hub.move_repo),
    ("GET", f"{MODEL}/auth-check(/write)?", Hub.auth_check),
    ("GET", f"{MODEL}(/revision/{REVISION})?", Hub.info),
    ("GET", f"{MODEL}/tree/{REVISION}(/(?P<path>.*))?", Hub.tree),
    ("POST", f"{MODEL}/paths-info/{REVISION}", Hub.paths_info),
    ("GET", f"{MODEL}/commits/{REVISION}", Hub.commits),
    ("GET", f"{MODEL}/refs", Hub.refs),
    ("POST|DELETE", f"{MODEL}/(branch|tag)/{REVISION}", Hub.branch_or_tag),
    ("POST", "/api/validate-yaml", Hub.validate_yaml),
    ("POST", f"{MODEL}/preupload/{REVISION}", Hub.preupload),
    ("POST", f"{MODEL}/commit/{REVISION}", Hub.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/verify", Hub.lfs_verify),
    ("PUT", rf"/lfs/{NAME}/(?P<oid>[0-9a-f]{{64}})(/(?P<part>\d+))?", Hub.lfs_put),
    ("POST", rf"/lfs/{NAME}/(?P<oid>[0-9a-f]{{64}})", Hub.lfs_complete),
    ("GET|HEAD", f"/cdn/{NAME}/(?P<oid>[0-9a-f]{{64}})", Hub.cdn),
    ("GET|HEAD", f"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Hub.resolve),
]
