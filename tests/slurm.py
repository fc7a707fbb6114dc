"""A real Slurm on simulated hosts: Debian's slurmctld and slurmd without munge and without systemd."""

from hosts import Cluster, wait_for

CONF = """\
ClusterName=sim
SlurmctldHost={first}({address})
AuthType=auth/none
CredType=cred/none
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
TmpFS=/run
SlurmctldTimeout=20
SlurmdTimeout=20
KillWait=2
UnkillableStepTimeout=20
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
"""


def start_slurm(hosts: Cluster, cpus: int = 4) -> dict[str, str]:
    """Start it; the environment that its commands need."""
    folder = hosts.folder / "slurm"
    (folder / "state").mkdir(parents=True)
    nodes = "".join(f"NodeName={host.name} NodeAddr={host.ip} CPUs={cpus} State=UNKNOWN\n" for host in hosts.hosts)
    head = CONF.format(first=hosts[0].name, address=hosts[0].ip, folder=folder)
    conf = folder / "slurm.conf"
    conf.write_text(f"{head}{nodes}PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n")
    # Named, or slurmd looks for a version in /sys/fs/cgroup and does not start where there is none.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    env = {"SLURM_CONF": str(conf)}
    hosts[0].run("slurmctld -i", env=env, check=True)
    for host in hosts.hosts:
        host.run(f"mkdir -p /run/spool-{host.name}", check=True)  # a short path: slurmd puts sockets there
        host.run("slurmd", env=env, check=True)
    wait_for(lambda: hosts[0].run(["sinfo", "-h", "-o", "%T"], env=env).stdout.split() == ["idle"], "Slurm", 30.0)
    return env
