"""`arcface plan push`, `pull`, `verify` and `gc`: plans between files, the cache and the store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arcface_build import terminal
from arcface_build.commands.options.numbers import NOT_NEGATIVE
from arcface_build.commands.options.output import hand_over, json_option
from arcface_build.commands.options.plans import megabytes, place_options

if TYPE_CHECKING:
    from arcface_build.plans.places import Places
    from arcface_clients.errors import ArcFaceError
    from arcface_clients.plans.manifest import PlanManifest

_PATH = click.Path(path_type=Path)


@click.command(
    epilog="\b\nExamples:\n  arcface plan push --all\n  arcface plan push 9363ac3dd29e --sign-key private.pem"
)
@click.argument("plans", nargs=-1, metavar="[FILE_OR_KEY]...")
@click.option("--all", "everything", is_flag=True, help="Every plan in the cache.")
@click.option("--sign-key", type=_PATH, help="PEM, ed25519: sign the manifests first.")
@click.option("--replace", is_flag=True, help="Replace the store's plan of the same key.")
@place_options
@json_option
def push(
    places: Places, plans: tuple[str, ...], everything: bool, sign_key: Path | None, replace: bool, as_json: bool
) -> None:
    """Publish plans to the store; keys that it already has are left unchanged unless --replace is given."""
    from arcface_build.plans.places import Places, plan_by_name
    from arcface_build.plans.store import PlanStore
    from arcface_clients.errors import WrongUse
    from arcface_clients.extras import require
    from arcface_clients.plans.signing import sign

    if sign_key:
        require("cryptography", purpose="--sign-key")
    store = places.need_store()
    if bool(plans) == everything:
        raise WrongUse("say what to push: files, keys or names, or --all. See them: arcface plan list")
    # From this host only; plans about to be signed may still be unsigned.
    public_key = None if sign_key else places.cache.public_key
    here = Places(PlanStore(places.cache.objects, public_key), None, places.config, places.folder)
    done = []
    for name in [manifest.key for manifest in here.cache.manifests(_say_refused)] if everything else plans:
        manifest, path, _ = plan_by_name(here, name)
        assert path is not None  # only files of this host were requested
        manifest = sign(manifest, sign_key) if sign_key else manifest
        with terminal.byte_bar(f"push {manifest.spec.file_name}", manifest.size_bytes) as progress:
            put = store.put(path, manifest, progress, replace=replace)
        same = put.manifest.sha256 == manifest.sha256
        state = "pushed" if put.created else "already there" if same else "the store keeps another build of this key"
        if sign_key and put.manifest.signature != manifest.signature:
            state += ", NOT signed by this key"
        done.append({"plan": manifest.spec.file_name, "key": manifest.key, "state": state, "store": store.url})
    _report(done, as_json, f"nothing to push: no plans in {places.cache.url}")


@click.command(
    epilog="\b\nExamples:\n  arcface plan pull --sm auto\n  arcface plan pull r50-fp16-sm86.plan --output plans/"
)
@click.argument("plans", nargs=-1, metavar="[KEY_OR_NAME]...")
@click.option("--sm", help="Every plan for this SM; auto: that of this host's GPU.")
@click.option("--precision", help="With --sm: only this precision.")
@click.option("--output", "-o", type=_PATH, help="A folder for plan and manifest, instead of the cache.")
@place_options
@json_option
def pull(
    places: Places, plans: tuple[str, ...], sm: str | None, precision: str | None, output: Path | None, as_json: bool
) -> int:
    """Fetch plans from the store; each is verified before it gets its final name.

    Exit code 1 if one is refused; the others are still pulled.
    """
    from arcface_build.errors import PlanNotFound
    from arcface_build.plans.get_or_build import get_or_build
    from arcface_build.plans.gpu import find_gpus
    from arcface_clients.errors import PlanRefused, WrongUse
    from arcface_clients.plans.fit import misfit
    from arcface_clients.plans.spec import parse_sm

    store = places.need_store()
    if bool(plans) == (sm is not None):
        raise WrongUse("say what to pull: keys or names, or --sm auto. See them: arcface plan list")
    if sm is None:
        wanted = [store.resolve(name) for name in plans]
    else:
        sm = find_gpus()[0].sm if sm == "auto" else parse_sm(sm)
        have = store.manifests(_say_refused)
        wanted = [m for m in have if misfit(m, sm, precision=precision) is None]
        if not wanted:
            found = ", ".join(sorted({m.spec.sm for m in have}, key=float)) or "none"
            raise PlanNotFound(
                f"no {precision + ' ' if precision else ''}plan for SM {sm} in {store.url} (found: {found}). "
                f"Build one on an SM {sm} GPU: arcface plan build"
            )
    done = []
    for manifest in wanted:
        row = {"plan": manifest.spec.file_name, "key": manifest.key}
        try:
            with terminal.byte_bar(f"pull {manifest.spec.file_name}", manifest.size_bytes) as progress:
                if output is not None:
                    path, state = store.pull(manifest, output, progress), "pulled"
                else:
                    obtained = get_or_build(manifest.spec, places.cache, store, progress=progress)
                    path, state = obtained.path, "pulled" if obtained.source == "store" else "already there"
            done.append({**row, "state": state, "path": str(path)})
        except PlanRefused as exc:
            done.append({**row, "state": f"REFUSED: {exc}"})
    _report(done, as_json, "nothing to pull")
    return 1 if any(row["state"].startswith("REFUSED") for row in done) else 0


@click.command(
    epilog="\b\nExamples:\n  arcface plan verify\n  arcface plan verify r50-fp16-sm86.plan --public-key public.pem"
)
@click.argument("plans", nargs=-1, metavar="[FILE_OR_KEY]...")
@place_options
@json_option
def verify(places: Places, plans: tuple[str, ...], as_json: bool) -> int:
    """Read whole plans back and check size, digest, key and signature; without names, all in cache and store.

    Exit code 1 if one is refused.
    """
    from arcface_build.errors import PlanNotFound
    from arcface_build.plans.places import plan_by_name
    from arcface_clients.errors import PlanRefused

    done: list[dict[str, Any]] = []

    def check(name: str, where: str, action: Any) -> None:
        try:
            action()
            done.append({"plan": name, "where": where, "state": "good"})
        except (PlanRefused, PlanNotFound) as exc:
            done.append({"plan": name, "where": where, "state": f"REFUSED: {exc}"})

    for name in plans:
        check(
            name,
            "file" if Path(name).is_file() else "cache or store",
            lambda n=name: _verify_one(places, plan_by_name(places, n)),
        )
    for where, store in [] if plans else places.all():
        refused: dict[str, Exception] = {}
        for manifest in store.manifests(refused.__setitem__):
            check(manifest.spec.file_name, where, lambda s=store, m=manifest: s.verify(m))
        done += [{"plan": key[:12], "where": where, "state": f"REFUSED: {exc}"} for key, exc in refused.items()]
    _report(done, as_json, "nothing to verify: there are no plans")
    return 1 if any(row["state"] != "good" for row in done) else 0


@click.command(
    epilog="\b\nExamples:\n  arcface plan gc --dry-run\n  arcface plan gc --keep-tensorrt 10.3.0 --store s3://models/plans"
)
@click.option(
    "--keep-tensorrt", "versions", multiple=True, help="Remove plans of every other TensorRT version; repeatable."
)
@click.option(
    "--min-age-h",
    type=NOT_NEGATIVE,
    default=1.0,
    show_default=True,
    help="Keep younger leftovers: they may be uploads in progress.",
)
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
@place_options
@json_option
def gc(places: Places, versions: tuple[str, ...], min_age_h: float, dry_run: bool, as_json: bool) -> None:
    """Remove leftovers (lost races, interrupted uploads, damaged manifests) from the cache and the store."""
    from arcface_clients.plans.spec import parse_version

    kept = {parse_version(version) for version in versions}
    done = []
    for where, plans in places.all():
        for stored in plans.orphans(min_age_h * 3600):
            done.append({"plan": stored.name, "where": where, "state": f"leftover, {megabytes(stored.size_bytes)}"})
            if not dry_run:
                plans.objects.delete(stored.name)
        for manifest in plans.manifests(lambda *_: None) if kept else []:
            if parse_version(manifest.spec.tensorrt) not in kept:
                state = f"TensorRT {manifest.spec.tensorrt}, {megabytes(manifest.size_bytes)}"
                done.append({"plan": manifest.spec.file_name, "where": where, "state": state})
                if not dry_run:
                    plans.delete(manifest.key)
    for path in _old_temporaries(places.folder, time.time() - min_age_h * 3600):
        done.append({"plan": path.name, "where": "cache", "state": f"unfinished, {megabytes(path.stat().st_size)}"})
        if not dry_run:
            path.unlink(missing_ok=True)
    _report(done, as_json, "nothing to remove")


def _verify_one(places: Places, found: tuple[PlanManifest, Path | None, str]) -> None:
    from arcface_clients.plans.read import read_plan

    manifest, path, _ = found
    if path is not None:
        read_plan(path, places.cache.public_key)
    else:
        places.need_store().verify(manifest)


def _old_temporaries(folder: Path, before_s: float) -> list[Path]:
    """Temporary files of killed writers; locks and timing caches are kept."""
    files = [p for p in folder.glob("*/**/.*") if p.is_file() and not p.relative_to(folder).parts[0].startswith(".")]
    return [p for p in files if p.stat().st_mtime < before_s]


def _say_refused(_: str, exc: ArcFaceError) -> None:
    terminal.complaint(f"refused: {exc}")


def _report(rows: list[dict[str, Any]], as_json: bool, nothing: str) -> None:
    lines = [
        f"{row['plan']}: {row['state']}" + "".join(f"  {row[key]}" for key in ("where", "path") if key in row)
        for row in rows
    ]
    hand_over(rows, lambda: "\n".join(lines) or nothing, as_json)
