"""Checks the JSON of `vmferry demo --json` on standard input: the keys it promises, and what it must show."""

import json
import sys

scenario, guest = sys.argv[1:]
report = json.load(sys.stdin)


def demand(holds, what):
    if not holds:
        json.dump(report, sys.stderr, indent=2)
        sys.exit(f"\ndemo {scenario} on {guest}: {what}")


KEYS = """status guest downtime-limit-ms expected-downtime-ms downtime-ms guest-observed-downtime-ms setup-time-ms
total-time-ms switchover-attempts switchover-revocations switchover-absorptions ram devices memory-identical
device-state-identical""".split()
RAM_KEYS = "total transferred normal duplicate dirty-sync-count mbps".split()
DEVICE_KEYS = "id initial-bytes dirty-bytes stop-copy-bytes reinits late-reinits acks".split()

for key in KEYS:
    demand(key in report, f"no key {key}")
for key in RAM_KEYS:
    demand(key in report["ram"], f"no key ram.{key}")
demand(report["devices"], "no devices")
for device in report["devices"]:
    for key in DEVICE_KEYS:
        demand(key in device, f"no key devices.{key}")

demand(report["status"] == "completed", "not completed")
demand(report["guest"] == guest, f"ran on {report['guest']}")
demand(report["memory-identical"] is True, "memory is not identical")
demand(report["device-state-identical"] is True, "device state is not identical")
demand(report["downtime-ms"] > 0, "no downtime was measured")
demand(report["devices"][0]["reinits"] >= 1, "no REINIT")
if scenario == "late-reinit":
    demand(report["switchover-revocations"] >= 1, "no revocation")
    demand(report["switchover-absorptions"] >= 1, "no absorption")

verification = report["verification-ms"]
downtime = report["downtime-ms"] - verification
print(
    f"completed and identical: downtime {downtime:.1f} ms (expected {report['expected-downtime-ms']:.1f}, "
    f"limit {report['downtime-limit-ms']:.0f}) and {verification:.1f} ms held to verify, "
    f"{report['switchover-revocations']} revoked, {report['switchover-absorptions']} absorbed, "
    f"{report['total-time-ms'] / 1000:.1f} s"
)
