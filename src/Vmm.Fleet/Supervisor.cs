// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using System.Threading;
using System.Threading.Tasks;
using Vmm.Config;

namespace Vmm.Fleet;

// Theory. The supervisor holds, for each VM, what is wanted (its definition; up or down) and what is (its phase), and one
// method, Tick, that does the next step towards what is wanted. Tick is called when something happened and at least a
// few times a second; it never waits. Starting processes, pressing power buttons and probing health are the business of
// an IVmHost, which reports back by calling OnStarted, OnEnded and OnProbed. So the whole policy (order, health,
// back-off, crash loops, fleet stop) is a state machine over a clock, and its tests need neither processes nor time.
//
//   Down --start--> Waiting --dependencies, slots--> Starting --socket answers--> Running <--> (Paused, by the guest's process)
//     ^                                                  |                           |
//     |<-----------------power-off, halt, stop-----------+<------------------------- + --> Stopping
//     |                                                                              |
//   Failed <--too many within the window-- Backoff <--reset, fault, error, kill------+
//
// A definition that changes while its VM runs takes effect at the next start; until then the VM is shown as changed. A
// definition that goes away while its VM runs asks the VM to stop. A file that no longer parses changes nothing.
//
// One lock guards everything; the host is called under it and must not call back from the same stack.

/// <summary>Where a VM is in its life.</summary>
public enum VmPhase
{
    /// <summary>Not running, and nothing is to be done.</summary>
    Down,

    /// <summary>To be started when others are up.</summary>
    Waiting,

    /// <summary>Its process was started and does not answer yet.</summary>
    Starting,

    /// <summary>Its process answers.</summary>
    Running,

    /// <summary>The guest was asked to shut down.</summary>
    Stopping,

    /// <summary>Ended by itself; started again after a while.</summary>
    Backoff,

    /// <summary>Ended too often; only a command starts it again.</summary>
    Failed,
}

/// <summary>What a health probe says.</summary>
public enum VmHealth
{
    /// <summary>No probe is defined, or none has answered yet.</summary>
    Unknown,

    /// <summary>The last probes failed, within the start period.</summary>
    Starting,

    /// <summary>Does its work. Without a probe: runs.</summary>
    Healthy,

    /// <summary>Enough probes in a row failed.</summary>
    Unhealthy,
}

/// <summary>What the supervisor needs from the world. Calls return at once and report back later; no call throws.</summary>
public interface IVmHost
{
    /// <summary>Starts the VM's process. Later: OnStarted, or OnEnded.</summary>
    void Launch(MachineSpec spec);

    /// <summary>Asks the guest to shut down.</summary>
    void AskToStop(string name);

    /// <summary>Ends the process, by command if it listens, by signal if not. Later: OnEnded.</summary>
    void End(string name);

    /// <summary>Probes health once. Later: OnProbed.</summary>
    void Probe(MachineSpec spec);

    /// <summary>Remembers what is wanted for as long as the host is up; null forgets it.</summary>
    void SaveIntent(string name, bool? wanted);
}

/// <summary>A line about one VM for lists, copied out of the supervisor.</summary>
public sealed record VmStatus
{
    /// <summary>Name.</summary>
    public required string Name { get; init; }

    /// <summary>Phase.</summary>
    public required VmPhase Phase { get; init; }

    /// <summary>Health.</summary>
    public required VmHealth Health { get; init; }

    /// <summary>The daemon keeps it up.</summary>
    public required bool Wanted { get; init; }

    /// <summary>Process number, 0 when there is none.</summary>
    public int Pid { get; init; }

    /// <summary>Since when it is in this phase.</summary>
    public DateTimeOffset Since { get; init; }

    /// <summary>Restarts within the window of its policy.</summary>
    public int Restarts { get; init; }

    /// <summary>How the last run ended; null when there was none.</summary>
    public VmExit? LastExit { get; init; }

    /// <summary>One line: what it waits for, why it failed; null when there is nothing to say.</summary>
    public string? Note { get; init; }

    /// <summary>The definition changed since it was started.</summary>
    public bool Changed { get; init; }

    /// <summary>The definition.</summary>
    public required MachineSpec Spec { get; init; }

    /// <summary>The definition that the process runs; null when there is no process.</summary>
    public MachineSpec? Running { get; init; }
}

/// <summary>Something that happened to a VM.</summary>
/// <param name="At">When.</param>
/// <param name="Name">Which VM.</param>
/// <param name="What">One word: waiting, starting, running, stopping, ended, backoff, failed, healthy, unhealthy, changed, removed.</param>
/// <param name="Detail">One line, or null.</param>
public sealed record FleetEvent(DateTimeOffset At, string Name, string What, string? Detail);

/// <summary>Keeps a fleet as it is declared; see the head of this file. Thread-safe.</summary>
public sealed class Supervisor
{
    /// <summary>Time that a process has until it answers; a busy host and a dead host's lease both take some of it.</summary>
    public static readonly TimeSpan StartLimit = TimeSpan.FromMinutes(2);

    private readonly Lock _gate = new();
    private readonly Dictionary<string, Entry> _entries = new(StringComparer.Ordinal);
    private readonly IVmHost _host;
    private readonly TimeProvider _time;
    private readonly int _startSlots;
    private List<Entry> _order = [];
    private FleetSpec _settings = new() { Machines = [] };
    private DateTimeOffset _lastLaunch = DateTimeOffset.MinValue;
    private bool _draining;
    private DateTimeOffset _drainDeadline;
    private TaskCompletionSource _changed = NewSignal();

    /// <summary>Makes one that supervises nothing yet.</summary>
    /// <param name="host">Processes.</param>
    /// <param name="time">Clock.</param>
    /// <param name="startSlots">VMs that may start at the same time where the definitions do not say; 0 for no limit.</param>
    public Supervisor(IVmHost host, TimeProvider time, int startSlots = 0)
    {
        _host = host;
        _time = time;
        _startSlots = startSlots;
    }

    /// <summary>Raised for every event, under the lock: handlers only queue.</summary>
    public event Action<FleetEvent>? Happened;

    /// <summary>Replaces what is declared. Names that are new start if their definition or intent says so.</summary>
    /// <param name="fleet">Checked definitions.</param>
    /// <param name="intents">What users wanted before this daemon started, by name.</param>
    public void Declare(FleetSpec fleet, IReadOnlyDictionary<string, bool>? intents = null)
    {
        ArgumentNullException.ThrowIfNull(fleet);
        IReadOnlyList<MachineSpec> sorted = FleetOrder.Sort(fleet.Machines);
        lock (_gate)
        {
            _settings = fleet;
            var names = new HashSet<string>(StringComparer.Ordinal);
            foreach (MachineSpec spec in sorted)
            {
                names.Add(spec.Name);
                if (_entries.TryGetValue(spec.Name, out Entry? entry))
                {
                    if (!SpecWriter.AreSame(entry.Spec, spec))
                    {
                        Tell(entry, "changed", null);
                    }

                    entry.Spec = spec;
                    entry.IsDeclared = true;
                    entry.Wanted = intents is not null && intents.TryGetValue(spec.Name, out bool kept) ? kept : entry.Wanted;
                }
                else
                {
                    bool wanted = intents is not null && intents.TryGetValue(spec.Name, out bool intent) ? intent : spec.Autostart;
                    _entries[spec.Name] = new Entry(spec, _time.GetUtcNow()) { Wanted = wanted };
                }
            }

            foreach (Entry entry in _entries.Values.ToList())
            {
                if (names.Contains(entry.Spec.Name))
                {
                    continue;
                }

                entry.IsDeclared = false;
                entry.Wanted = false;
                if (entry.HasProcess)
                {
                    Tell(entry, "removed", "its definition is gone; asking it to stop");
                }
            }

            _order = [.. sorted.Select(spec => _entries[spec.Name]), .. _entries.Values.Where(entry => !entry.IsDeclared)];
            TickLocked();
        }
    }

    /// <summary>A VM that was found running: it is taken over with the definition that it runs.</summary>
    public void Adopt(MachineSpec running, int pid)
    {
        ArgumentNullException.ThrowIfNull(running);
        lock (_gate)
        {
            if (!_entries.TryGetValue(running.Name, out Entry? entry))
            {
                entry = new Entry(running, _time.GetUtcNow()) { IsDeclared = false };
                _entries[running.Name] = entry;
                _order.Add(entry);
            }

            entry.Wanted = true;
            entry.Running = running;
            entry.Pid = pid;
            entry.Enter(VmPhase.Running, _time.GetUtcNow());
            Tell(entry, "running", string.Create(CultureInfo.InvariantCulture, $"found running as process {pid}"));
            TickLocked();
        }
    }

    /// <summary>The VM's process answers on its control socket.</summary>
    public void OnStarted(string name, int pid)
    {
        lock (_gate)
        {
            if (_entries.TryGetValue(name, out Entry? entry) && entry.Phase is VmPhase.Starting or VmPhase.Stopping)
            {
                entry.Pid = pid;
                if (entry.Phase == VmPhase.Starting)
                {
                    entry.Enter(VmPhase.Running, _time.GetUtcNow());
                    Tell(entry, "running", null);
                }

                TickLocked();
            }
        }
    }

    /// <summary>The VM's process has ended, or could not be started.</summary>
    public void OnEnded(string name, VmExit exit)
    {
        ArgumentNullException.ThrowIfNull(exit);
        lock (_gate)
        {
            if (!_entries.TryGetValue(name, out Entry? entry) || !entry.HasProcess)
            {
                return;
            }

            Tell(entry, "ended", exit.Message is null ? exit.Reason : $"{exit.Reason}: {exit.Message}");
            Decide(entry, exit);
            TickLocked();
        }
    }

    /// <summary>A health probe has answered.</summary>
    public void OnProbed(string name, bool healthy)
    {
        lock (_gate)
        {
            if (!_entries.TryGetValue(name, out Entry? entry))
            {
                return;
            }

            entry.IsProbing = false;
            if (entry.Phase != VmPhase.Running || entry.Spec.Health is not { } probe)
            {
                return;
            }

            VmHealth before = entry.Health;
            if (healthy)
            {
                entry.ProbeFailures = 0;
                entry.Health = VmHealth.Healthy;
            }
            else
            {
                bool isStarting = before is VmHealth.Unknown or VmHealth.Starting
                    && _time.GetUtcNow() - entry.Since < probe.StartPeriod;
                entry.ProbeFailures += isStarting ? 0 : 1;
                entry.Health = isStarting ? VmHealth.Starting
                    : entry.ProbeFailures >= probe.Retries ? VmHealth.Unhealthy
                    : before;
            }

            if (entry.Health != before && entry.Health is VmHealth.Healthy or VmHealth.Unhealthy)
            {
                Tell(entry, entry.Health == VmHealth.Healthy ? "healthy" : "unhealthy", null);
            }

            if (entry.Health == VmHealth.Unhealthy && probe.Restart)
            {
                entry.EndReason = new VmExit(4, "unhealthy", "its health probe failed");
                _host.End(name);
            }

            TickLocked();
        }
    }

    /// <summary>Wants a VM up, with everything that it requires.</summary>
    /// <returns>False when no such VM is declared.</returns>
    public bool Start(string name)
    {
        lock (_gate)
        {
            if (!_entries.TryGetValue(name, out Entry? entry) || !entry.IsDeclared)
            {
                return false;
            }

            var left = new Stack<Entry>([entry]);
            var seen = new HashSet<string>(StringComparer.Ordinal);
            while (left.TryPop(out Entry? next))
            {
                if (!seen.Add(next.Spec.Name))
                {
                    continue;
                }

                Want(next, true);
                if (next.Phase is VmPhase.Failed or VmPhase.Backoff)
                {
                    next.Restarts.Clear();
                    next.Enter(VmPhase.Down, _time.GetUtcNow());
                }

                foreach (string required in next.Spec.Requires)
                {
                    if (_entries.TryGetValue(required, out Entry? other))
                    {
                        left.Push(other);
                    }
                }
            }

            TickLocked();
            return true;
        }
    }

    /// <summary>Wants a VM down: asks the guest, or ends it at once.</summary>
    /// <returns>False when there is no such VM.</returns>
    public bool Stop(string name, bool force)
    {
        lock (_gate)
        {
            if (!_entries.TryGetValue(name, out Entry? entry))
            {
                return false;
            }

            StopLocked(entry, force);
            TickLocked();
            return true;
        }
    }

    /// <summary>Wants every VM down, those first that others were started before.</summary>
    public void StopAll(bool force)
    {
        lock (_gate)
        {
            foreach (Entry entry in _order)
            {
                StopLocked(entry, force);
            }

            TickLocked();
        }
    }

    /// <summary>Takes back a stop that the guest did not follow: the VM stays up.</summary>
    public void CancelStop(string name)
    {
        lock (_gate)
        {
            if (_entries.TryGetValue(name, out Entry? entry) && entry.Phase == VmPhase.Stopping)
            {
                Want(entry, true);
                entry.Enter(VmPhase.Running, _time.GetUtcNow());
                Tell(entry, "running", "did not follow the request to stop");
            }
        }
    }

    /// <summary>Stops everything, last started first, and starts nothing more.</summary>
    /// <param name="limit">After this time what is left is ended.</param>
    public void Drain(TimeSpan limit)
    {
        lock (_gate)
        {
            _draining = true;
            _drainDeadline = _time.GetUtcNow() + limit;
            TickLocked();
        }
    }

    /// <summary>Does the next steps. At least a few times a second.</summary>
    public void Tick()
    {
        lock (_gate)
        {
            TickLocked();
        }
    }

    /// <summary>A copy of one VM's line; null when there is none.</summary>
    public VmStatus? Find(string name)
    {
        lock (_gate)
        {
            return _entries.TryGetValue(name, out Entry? entry) ? Describe(entry) : null;
        }
    }

    /// <summary>A copy of all lines, in start order.</summary>
    public IReadOnlyList<VmStatus> List()
    {
        lock (_gate)
        {
            return [.. _order.Select(Describe)];
        }
    }

    /// <summary>Waits until a condition holds.</summary>
    /// <returns>False when the time was up.</returns>
    /// <exception cref="OperationCanceledException">The token was cancelled.</exception>
    public async Task<bool> WaitAsync(Func<Supervisor, bool> condition, TimeSpan timeout, CancellationToken cancellation)
    {
        ArgumentNullException.ThrowIfNull(condition);
        using var limit = new CancellationTokenSource(timeout, _time);
        using var both = CancellationTokenSource.CreateLinkedTokenSource(limit.Token, cancellation);
        while (true)
        {
            Task changed;
            lock (_gate)
            {
                changed = _changed.Task;
            }

            if (condition(this))
            {
                return true;
            }

            try
            {
                await changed.WaitAsync(both.Token).ConfigureAwait(false);
            }
            catch (OperationCanceledException) when (!cancellation.IsCancellationRequested)
            {
                return condition(this);
            }
        }
    }

    private static TaskCompletionSource NewSignal() => new(TaskCreationOptions.RunContinuationsAsynchronously);

    private static VmStatus Describe(Entry entry) => new()
    {
        Name = entry.Spec.Name,
        Phase = entry.Phase,
        Health = entry.EffectiveHealth,
        Wanted = entry.Wanted,
        Pid = entry.HasProcess ? entry.Pid : 0,
        Since = entry.Since,
        Restarts = entry.Restarts.Count,
        LastExit = entry.LastExit,
        Note = entry.Note,
        Changed = entry.Running is { } running && entry.HasProcess && !SpecWriter.AreSame(running, entry.Spec),
        Spec = entry.Spec,
        Running = entry.HasProcess ? entry.Running : null,
    };

    private void StopLocked(Entry entry, bool force)
    {
        Want(entry, false);
        if (force && entry.HasProcess)
        {
            entry.EndReason = new VmExit(1, "quit", "ended by command");
            entry.Enter(VmPhase.Stopping, _time.GetUtcNow());
            _host.End(entry.Spec.Name);
        }
    }

    private void Want(Entry entry, bool wanted)
    {
        entry.Wanted = wanted;
        _host.SaveIntent(entry.Spec.Name, wanted == entry.Spec.Autostart ? null : wanted);
    }

    private void Tell(Entry entry, string what, string? detail)
    {
        Happened?.Invoke(new FleetEvent(_time.GetUtcNow(), entry.Spec.Name, what, detail));
        TaskCompletionSource signal = _changed;
        _changed = NewSignal();
        signal.SetResult();
    }

    // What the end of a run means under the VM's policy.
    private void Decide(Entry entry, VmExit exit)
    {
        DateTimeOffset now = _time.GetUtcNow();
        VmExit actual = entry.EndReason ?? exit;
        bool byCommand = !entry.Wanted || _draining;
        RestartSpec policy = entry.Spec.Restart;
        bool isOrderly = actual.Reason is "power-off" or "halt" or "quit" or "debug-exit";
        bool again = !byCommand && policy.Policy switch
        {
            RestartPolicy.Always => true,
            RestartPolicy.OnFailure => !isOrderly,
            _ => false,
        };
        TimeSpan ran = now - entry.Since;
        entry.LastExit = actual;
        entry.EndReason = null;
        entry.Running = null;
        if (!again)
        {
            if (!byCommand)
            {
                // It ended as it should; the user starts it again when it is wanted again.
                Want(entry, false);
            }

            entry.Restarts.Clear();
            entry.Enter(VmPhase.Down, now);
            Tell(entry, "down", null);
            return;
        }

        if (ran >= policy.Window)
        {
            entry.Restarts.Clear();
        }

        entry.Restarts.RemoveAll(at => now - at > policy.Window);
        if (policy.Limit != 0 && entry.Restarts.Count >= policy.Limit)
        {
            entry.Enter(VmPhase.Failed, now);
            entry.Note = string.Create(
                CultureInfo.InvariantCulture,
                $"gave up after {entry.Restarts.Count} restarts within {Quantity.FormatDuration(policy.Window)}; last end: {actual.Reason}");
            Tell(entry, "failed", entry.Note);
            return;
        }

        // A guest that reboots after a good while is back at once; everything else waits, twice as long each time.
        bool isCalmReboot = actual.Reason is "reset" && ran >= TimeSpan.FromSeconds(10);
        double factor = Math.Pow(2, Math.Min(entry.Restarts.Count, 30));
        TimeSpan wait = isCalmReboot ? TimeSpan.Zero : Min(policy.Backoff * factor, policy.MaxBackoff);
        entry.Restarts.Add(now);
        entry.Enter(VmPhase.Backoff, now);
        entry.NotBefore = now + wait;
        entry.Note = $"{actual.Reason}; starts again after {Quantity.FormatDuration(wait)}";
        Tell(entry, "backoff", entry.Note);
    }

    private static TimeSpan Min(TimeSpan a, TimeSpan b) => a < b ? a : b;

    private void TickLocked()
    {
        DateTimeOffset now = _time.GetUtcNow();
        int starting = _order.Count(entry => entry.Phase == VmPhase.Starting);
        foreach (Entry entry in _order)
        {
            switch (entry.Phase)
            {
                case VmPhase.Down or VmPhase.Waiting or VmPhase.Backoff when entry.Wanted && !_draining:
                    starting += TryLaunch(entry, now, starting) ? 1 : 0;
                    break;
                case VmPhase.Waiting or VmPhase.Backoff or VmPhase.Failed when !entry.Wanted || _draining:
                    entry.Enter(VmPhase.Down, now);
                    Tell(entry, "down", null);
                    break;
                case VmPhase.Starting when now - entry.Since > StartLimit:
                    entry.EndReason = new VmExit(4, "error", "its process did not answer within two minutes");
                    entry.Enter(VmPhase.Starting, now);
                    _host.End(entry.Spec.Name);
                    break;
                case VmPhase.Running:
                    ProbeIfDue(entry, now);
                    break;
                default:
                    break;
            }
        }

        for (int i = _order.Count - 1; i >= 0; i--)
        {
            StopIfDue(_order[i], now);
        }

        for (int i = _order.Count - 1; i >= 0; i--)
        {
            Entry entry = _order[i];
            if (!entry.IsDeclared && !entry.HasProcess)
            {
                _order.RemoveAt(i);
                _entries.Remove(entry.Spec.Name);
                _host.SaveIntent(entry.Spec.Name, null);
            }
        }
    }

    private bool TryLaunch(Entry entry, DateTimeOffset now, int starting)
    {
        if (entry.Phase == VmPhase.Backoff && now < entry.NotBefore)
        {
            return false;
        }

        string? wait = WaitsFor(entry);
        int slots = _settings.StartParallel ?? _startSlots;
        bool slot = slots == 0 || starting < slots;
        bool pause = now - _lastLaunch >= _settings.StartDelay;
        if (wait is not null || !slot || !pause)
        {
            if (entry.Phase != VmPhase.Waiting)
            {
                entry.Enter(VmPhase.Waiting, now);
                Tell(entry, "waiting", wait);
            }

            entry.Note = wait;
            return false;
        }

        _lastLaunch = now;
        entry.Running = entry.Spec;
        entry.EndReason = null;
        entry.Pid = 0;
        entry.Enter(VmPhase.Starting, now);
        Tell(entry, "starting", null);
        _host.Launch(entry.Spec);
        return true;
    }

    private string? WaitsFor(Entry entry)
    {
        foreach (string name in entry.Spec.After)
        {
            // Only order: a VM that is not to come up is not waited for.
            if (_entries.TryGetValue(name, out Entry? other) && other.Wanted && other.Phase is VmPhase.Down or VmPhase.Waiting or VmPhase.Starting)
            {
                return $"waits for {name} to run";
            }
        }

        foreach (string name in entry.Spec.Requires)
        {
            if (!_entries.TryGetValue(name, out Entry? other))
            {
                return $"requires {name}, which is not defined";
            }

            if (other.Phase != VmPhase.Running || other.EffectiveHealth != VmHealth.Healthy)
            {
                string state = other.Phase == VmPhase.Running ? "not healthy yet" : other.Phase.ToString().ToLowerInvariant();
                return $"requires {name}, which is {state}";
            }
        }

        return null;
    }

    private void ProbeIfDue(Entry entry, DateTimeOffset now)
    {
        if (entry.Spec.Health is { } health && !entry.IsProbing && now >= entry.NextProbe)
        {
            // Until it is healthy for the first time others may wait for it: probe more often then.
            bool isFresh = entry.Health is VmHealth.Unknown or VmHealth.Starting;
            entry.NextProbe = now + (isFresh ? Min(health.Interval, TimeSpan.FromSeconds(1)) : health.Interval);
            entry.IsProbing = true;
            _host.Probe(entry.Spec);
        }
    }

    private void StopIfDue(Entry entry, DateTimeOffset now)
    {
        bool shouldStop = _draining || !entry.Wanted;
        if (!shouldStop || !entry.HasProcess)
        {
            return;
        }

        if (_draining && now >= _drainDeadline)
        {
            if (!entry.IsEnding)
            {
                entry.IsEnding = true;
                entry.EndReason = new VmExit(1, "quit", "did not stop in time");
                _host.End(entry.Spec.Name);
            }

            return;
        }

        if (entry.Phase == VmPhase.Running && !IsNeeded(entry))
        {
            entry.Enter(VmPhase.Stopping, now);
            entry.NextAsk = DateTimeOffset.MinValue;
            Tell(entry, "stopping", null);
        }

        // Guests may miss a button that is pressed while they boot: press again every ten seconds.
        if (entry.Phase == VmPhase.Stopping && entry.EndReason is null && now >= entry.NextAsk)
        {
            entry.NextAsk = now + TimeSpan.FromSeconds(10);
            _host.AskToStop(entry.Spec.Name);
        }
    }

    // True while a VM that was started after this one, and is to go too, still has a process. One that is to stay does not
    // keep a user from stopping this one.
    private bool IsNeeded(Entry entry) => _order.Exists(other => other.HasProcess && (_draining || !other.Wanted)
        && (other.Spec.After.Contains(entry.Spec.Name, StringComparer.Ordinal)
            || other.Spec.Requires.Contains(entry.Spec.Name, StringComparer.Ordinal)));

    private sealed class Entry
    {
        internal Entry(MachineSpec spec, DateTimeOffset now)
        {
            Spec = spec;
            Since = now;
        }

        internal MachineSpec Spec { get; set; }

        /// <summary>The definition that the process runs.</summary>
        internal MachineSpec? Running { get; set; }

        internal bool IsDeclared { get; set; } = true;

        internal bool Wanted { get; set; }

        internal VmPhase Phase { get; private set; }

        internal DateTimeOffset Since { get; private set; }

        internal int Pid { get; set; }

        internal List<DateTimeOffset> Restarts { get; } = [];

        internal DateTimeOffset NotBefore { get; set; }

        internal VmExit? LastExit { get; set; }

        /// <summary>Why we ended it, which counts for more than how it ended.</summary>
        internal VmExit? EndReason { get; set; }

        internal string? Note { get; set; }

        internal VmHealth Health { get; set; }

        internal int ProbeFailures { get; set; }

        internal bool IsProbing { get; set; }

        internal bool IsEnding { get; set; }

        internal DateTimeOffset NextProbe { get; set; }

        internal DateTimeOffset NextAsk { get; set; }

        internal bool HasProcess => Phase is VmPhase.Starting or VmPhase.Running or VmPhase.Stopping;

        internal VmHealth EffectiveHealth =>
            Spec.Health is null && Phase == VmPhase.Running ? VmHealth.Healthy : Health;

        internal void Enter(VmPhase phase, DateTimeOffset now)
        {
            Phase = phase;
            Since = now;
            Note = null;
            IsEnding = false;
            if (phase is not (VmPhase.Running or VmPhase.Stopping))
            {
                Health = VmHealth.Unknown;
                ProbeFailures = 0;
            }

            NextProbe = DateTimeOffset.MinValue;
        }
    }
}
