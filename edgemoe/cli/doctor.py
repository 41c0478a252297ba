"""`edgemoe doctor`: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

from edgemoe.cli.options import command, report, reporting
from edgemoe.disk import human_bytes


@command("edgemoe doctor")
@reporting
def doctor(as_json: bool) -> None:
    """Show this machine: device, JetPack, engines, memory, heat, and what is missing.

    Each missing package comes with the command that installs it.
    """
    from edgemoe.cli.machine import examine

    facts = examine()
    installed = [f"{name} {version}" for name, version in facts["packages"].items() if version]
    memory = facts["memory"]
    capability = facts["gpu_compute_capability"]
    rows = {
        "machine": facts["machine"],
        "device": facts["device"],
        "JetPack": facts["jetpack"] or "-",
        "GPU": "none" if capability is None else f"compute capability {capability / 10:.1f}",
        "Python": facts["python"],
        "packages": ", ".join(installed) or "-",
        "providers": ", ".join(facts["onnxruntime_providers"]) or "-",
        "trtexec": facts["trtexec"] or "-",
        "memory": f"{human_bytes(memory.get('available_bytes', 0))} available of "
        f"{human_bytes(memory.get('total_bytes', 0))}",
        "hottest": f"{max(facts['temperatures_c'].values()):.1f} C"
        if facts["temperatures_c"]
        else "-",
        "throttling": ", ".join(facts["throttling"]) or "no",
    }
    lines = [f"{name:<11} {value}" for name, value in rows.items()]
    lines += [f"{'missing':<11} {item}" for item in facts["missing"]]
    report(facts, "\n".join(lines), as_json=as_json)
