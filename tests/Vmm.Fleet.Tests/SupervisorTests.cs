// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Linq;
using FluentAssertions;
using Vmm.Config;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Fleet.Tests;

/// <summary>The policy of the fleet over a clock that the test turns: no processes, no waiting.</summary>
public sealed class SupervisorTests
{
    private readonly ManualTime _time = new();
    private readonly FakeHost _host = new();
    private readonly Supervisor _fleet;
    private readonly List<string> _events = [];

    public SupervisorTests()
    {
        _fleet = new Supervisor(_host, _time);
        _fleet.Happened += happened => _events.Add($"{happened.Name} {happened.What}");
    }

    [Fact]
    public void Start_FollowsAfterAndRequires()
    {
        Declare("""
            vms:
              - {name: web, requires: [db], after: [dns]}
              - {name: db, health: {tcp: "127.0.0.1:5432"}}
              - {name: dns}
            """);

        _host.Launched.Should().Equal("dns", "db");
        Up("dns");
        Up("db");
        Phase("web").Should().Be(VmPhase.Waiting);
        _fleet.Find("web")!.Note.Should().Be("requires db, which is not healthy yet");
        _fleet.Tick();
        _host.Probed.Should().Equal("db");
        _fleet.OnProbed("db", healthy: true);

        _host.Launched.Should().Equal("dns", "db", "web");
    }

    [Fact]
    public void Start_OfAVmThatIsNotToComeUp_IsNotWaitedForByAfter()
    {
        Declare("vms: [{name: a, autostart: false}, {name: b, after: [a]}]");

        _host.Launched.Should().Equal("b");
    }

    [Fact]
    public void Start_ByCommand_PullsWhatIsRequired()
    {
        Declare("vms: [{name: a, autostart: false}, {name: b, requires: [a], autostart: false}]");
        _host.Launched.Should().BeEmpty();

        _fleet.Start("b").Should().BeTrue();

        _host.Launched.Should().Equal("a");
        Up("a");
        _host.Launched.Should().Equal("a", "b");
        _fleet.Start("c").Should().BeFalse();
    }

    [Fact]
    public void Start_Staggered_KeepsToSlotsAndDelay()
    {
        Declare("{start: {parallel: 2, delay: 1s}, vms: [{name: a}, {name: b}, {name: c}]}");

        _host.Launched.Should().Equal("a");
        Pass(1);
        _host.Launched.Should().Equal("a", "b");
        Pass(5);
        _host.Launched.Should().Equal("a", "b");
        Up("a");
        _host.Launched.Should().Equal("a", "b", "c");
    }

    [Fact]
    public void Start_ByDefault_KeepsToSlotsThatSuitTheHost()
    {
        var fleet = new Supervisor(_host, _time, startSlots: 3);
        fleet.Declare(Parse("vms: [{name: a}, {name: b}, {name: c}, {name: d}, {name: e}]"));

        _host.Launched.Should().Equal("a", "b", "c");
        fleet.OnStarted("b", 100);
        _host.Launched.Should().Equal("a", "b", "c", "d");
        fleet.OnEnded("a", VmExit.Vanished);
        _host.Launched.Should().Equal("a", "b", "c", "d", "e");
    }

    [Fact]
    public void StopAll_AsksDependentsFirst_AndLeavesAllDown()
    {
        Declare("vms: [{name: db}, {name: web, requires: [db]}, {name: other}]");
        Up("db");
        Up("web");
        Up("other");

        _fleet.StopAll(force: false);
        _host.Asked.Should().BeEquivalentTo("web", "other");
        _fleet.OnEnded("web", new VmExit(1, "power-off", null));
        _host.Asked.Should().BeEquivalentTo("web", "other", "db");
        _fleet.OnEnded("other", new VmExit(1, "power-off", null));
        _fleet.OnEnded("db", new VmExit(1, "power-off", null));

        _fleet.List().Should().OnlyContain(vm => vm.Phase == VmPhase.Down && !vm.Wanted);
    }

    [Theory]
    [InlineData("never", "error", false)]
    [InlineData("never", "reset", false)]
    [InlineData("on-failure", "error", true)]
    [InlineData("on-failure", "reset", true)]
    [InlineData("on-failure", "triple-fault", true)]
    [InlineData("on-failure", "killed", true)]
    [InlineData("on-failure", "power-off", false)]
    [InlineData("on-failure", "halt", false)]
    [InlineData("always", "power-off", true)]
    [InlineData("always", "halt", true)]
    public void Restart_FollowsThePolicy(string policy, string reason, bool again)
    {
        Declare($"{{name: a, restart: {policy}}}");
        Up("a");
        _fleet.OnEnded("a", new VmExit(0, reason, null));
        Pass(2);

        _host.Launched.Should().HaveCount(again ? 2 : 1);
        Phase("a").Should().Be(again ? VmPhase.Starting : VmPhase.Down);
    }

    [Fact]
    public void Restart_BacksOffTwiceAsLongEachTime_AndGivesUp()
    {
        Declare("name: a\nrestart: {policy: on-failure, backoff: 1s, max-backoff: 4s, limit: 4, window: 10m}");
        var waits = new List<int>();
        for (int round = 0; round < 4; round++)
        {
            Up("a");
            int before = _host.Launched.Count;
            _fleet.OnEnded("a", VmExit.Vanished);
            Phase("a").Should().Be(VmPhase.Backoff);
            int seconds = 0;
            for (; _host.Launched.Count == before && seconds < 100; seconds++)
            {
                Pass(1);
            }

            waits.Add(seconds);
        }

        Up("a");
        _fleet.OnEnded("a", VmExit.Vanished);

        waits.Should().Equal(1, 2, 4, 4);
        Phase("a").Should().Be(VmPhase.Failed);
        _fleet.Find("a")!.Note.Should().Be("gave up after 4 restarts within 600s; last end: killed");
        Pass(3600);
        _host.Launched.Should().HaveCount(5);

        _fleet.Start("a");
        _host.Launched.Should().HaveCount(6);
    }

    [Fact]
    public void Restart_AfterALongRun_ForgetsEarlierFailures()
    {
        Declare("name: a\nrestart: {policy: on-failure, backoff: 1s, limit: 2, window: 1m}");
        for (int round = 0; round < 10; round++)
        {
            Up("a");
            Pass(120);
            _fleet.OnEnded("a", VmExit.Vanished);
            Phase("a").Should().Be(VmPhase.Backoff);
            Pass(1);
        }

        _host.Launched.Should().HaveCount(11);
    }

    [Fact]
    public void Reboot_AfterAWhile_IsFollowedAtOnce()
    {
        Declare("name: a");
        Up("a");
        Pass(30);
        _fleet.OnEnded("a", new VmExit(0, "reset", null));

        _host.Launched.Should().HaveCount(2);
    }

    [Fact]
    public void Stop_AsksAgain_AndLeavesTheVmDown()
    {
        Declare("name: a\nrestart: always");
        Up("a");
        _fleet.Stop("a", force: false);
        _host.Asked.Should().Equal("a");
        Pass(11);
        _host.Asked.Should().Equal("a", "a");
        _fleet.OnEnded("a", new VmExit(1, "power-off", null));
        Pass(60);

        Phase("a").Should().Be(VmPhase.Down);
        _host.Launched.Should().HaveCount(1);
        _host.Intents.Should().Contain("a", false);
    }

    [Fact]
    public void Stop_TakenBack_KeepsTheVmUp()
    {
        Declare("name: a");
        Up("a");
        _fleet.Stop("a", force: false);
        _fleet.CancelStop("a");

        Phase("a").Should().Be(VmPhase.Running);
        _fleet.Find("a")!.Wanted.Should().BeTrue();
    }

    [Fact]
    public void Stop_WithForce_EndsTheProcess()
    {
        Declare("name: a\nrestart: always");
        Up("a");
        _fleet.Stop("a", force: true);

        _host.EndedByUs.Should().Equal("a");
        _fleet.OnEnded("a", VmExit.Vanished);
        Phase("a").Should().Be(VmPhase.Down);
        _fleet.Find("a")!.LastExit!.Reason.Should().Be("quit");
    }

    [Fact]
    public void Drain_StopsLastStartedFirst_AndEndsWhatDoesNotFollow()
    {
        Declare("vms: [{name: a}, {name: b, after: [a]}, {name: c, requires: [b]}]");
        Up("a");
        Up("b");
        Up("c");
        _fleet.Drain(TimeSpan.FromSeconds(30));

        _host.Asked.Should().Equal("c");
        _fleet.OnEnded("c", new VmExit(1, "power-off", null));
        _host.Asked.Should().Equal("c", "b");
        Pass(31);
        _host.EndedByUs.Should().Equal("b", "a");
        _fleet.OnEnded("b", VmExit.Vanished);
        _fleet.OnEnded("a", VmExit.Vanished);
        _fleet.List().Should().OnlyContain(vm => vm.Phase == VmPhase.Down);
        _host.Launched.Should().HaveCount(3);
    }

    [Fact]
    public void Definition_EditedWhileRunning_IsShownAndTakesEffectAtTheNextStart()
    {
        Declare("name: a\nmemory: 64M");
        Up("a");
        Declare("name: a\nmemory: 128M");

        _fleet.Find("a")!.Changed.Should().BeTrue();
        _host.Launched.Should().HaveCount(1);
        _fleet.OnEnded("a", VmExit.Vanished);
        Pass(1);
        _host.LastSpec!.MemoryBytes.Should().Be(128L << 20);
        _fleet.Find("a")!.Changed.Should().BeFalse();
    }

    [Fact]
    public void Definition_Removed_StopsTheVmAndForgetsIt()
    {
        Declare("vms: [{name: a}, {name: b}]");
        Up("a");
        Up("b");
        Declare("name: b");

        _host.Asked.Should().Equal("a");
        _fleet.OnEnded("a", new VmExit(1, "power-off", null));
        _fleet.List().Select(vm => vm.Name).Should().Equal("b");
    }

    [Fact]
    public void Health_FailingAfterTheStartPeriod_IsReportedAndRestarts()
    {
        Declare("name: a\nhealth: {tcp: \"127.0.0.1:1\", interval: 1s, retries: 2, start-period: 5s, restart: true}");
        Up("a");
        for (int second = 0; second < 5; second++)
        {
            _fleet.OnProbed("a", healthy: false);
            _fleet.Find("a")!.Health.Should().Be(VmHealth.Starting);
            Pass(1);
        }

        _fleet.OnProbed("a", healthy: false);
        _host.EndedByUs.Should().BeEmpty();
        _fleet.OnProbed("a", healthy: false);
        _fleet.Find("a")!.Health.Should().Be(VmHealth.Unhealthy);
        _host.EndedByUs.Should().Equal("a");
        _fleet.OnEnded("a", VmExit.Vanished);
        _fleet.Find("a")!.LastExit!.Reason.Should().Be("unhealthy");
        Phase("a").Should().Be(VmPhase.Backoff);
    }

    [Fact]
    public void Adopted_Vm_IsNotStartedAgain()
    {
        MachineSpec old = ConfigFiles.Parse("name: a\nmemory: 64M", "t", "/").Machines[0];
        _fleet.Adopt(old, 4711);
        Declare("name: a\nmemory: 64M");

        _host.Launched.Should().BeEmpty();
        _fleet.Find("a").Should().Match<VmStatus>(vm => vm.Phase == VmPhase.Running && vm.Pid == 4711 && vm.Wanted);
    }

    [Fact]
    public void Intent_FromBeforeTheDaemon_CountsForMoreThanAutostart()
    {
        var intents = new Dictionary<string, bool>(StringComparer.Ordinal) { ["a"] = false, ["b"] = true };
        _fleet.Declare(Parse("vms: [{name: a}, {name: b, autostart: false}]"), intents);

        _host.Launched.Should().Equal("b");
    }

    [Fact]
    public void Process_ThatNeverAnswers_IsEndedAndBacksOff()
    {
        Declare("name: a");
        Pass(121);
        _host.EndedByUs.Should().Equal("a");
        _fleet.OnEnded("a", VmExit.Vanished);

        Phase("a").Should().Be(VmPhase.Backoff);
        _fleet.Find("a")!.LastExit!.Message.Should().Be("its process did not answer within two minutes");
    }

    [Fact]
    public void RandomEvents_NeverStartAVmTwice()
    {
        var random = new Random(606);
        string text = "vms: [{name: a, restart: always}, {name: b, after: [a]}, {name: c, requires: [b]}, {name: d}]";
        Declare(text);
        string[] names = ["a", "b", "c", "d"];
        for (int round = 0; round < 50_000; round++)
        {
            string name = names[random.Next(4)];
            switch (random.Next(9))
            {
                case 0:
                    _fleet.Start(name);
                    break;
                case 1:
                    _fleet.Stop(name, random.Next(2) == 0);
                    break;
                case 2:
                    _fleet.CancelStop(name);
                    break;
                case 3 when _host.Alive.Contains(name):
                    _host.Alive.Remove(name);
                    _fleet.OnEnded(name, random.Next(2) == 0 ? VmExit.Vanished : new VmExit(1, "power-off", null));
                    break;
                case 4 when _host.Alive.Contains(name):
                    _fleet.OnStarted(name, 1);
                    break;
                case 5:
                    Declare(random.Next(3) == 0 ? "vms: [{name: a}, {name: b}]" : text);
                    break;
                default:
                    Pass(random.Next(5));
                    break;
            }

            _host.DoubleLaunch.Should().BeNull();
        }

        _host.Launched.Count.Should().BeGreaterThan(100);
    }

    private static FleetSpec Parse(string text) => ConfigFiles.Parse(text, "t.yaml", "/");

    private void Declare(string text) => _fleet.Declare(Parse(text));

    private VmPhase Phase(string name) => _fleet.Find(name)!.Phase;

    private void Up(string name) => _fleet.OnStarted(name, 100);

    private void Pass(int seconds)
    {
        _time.Advance(TimeSpan.FromSeconds(seconds));
        _fleet.Tick();
    }

    private sealed class FakeHost : IVmHost
    {
        internal List<string> Launched { get; } = [];

        internal List<string> Asked { get; } = [];

        internal List<string> EndedByUs { get; } = [];

        internal List<string> Probed { get; } = [];

        internal HashSet<string> Alive { get; } = [];

        internal Dictionary<string, bool?> Intents { get; } = [];

        internal MachineSpec? LastSpec { get; private set; }

        internal string? DoubleLaunch { get; private set; }

        public void Launch(MachineSpec spec)
        {
            Launched.Add(spec.Name);
            LastSpec = spec;
            DoubleLaunch = Alive.Add(spec.Name) ? DoubleLaunch : spec.Name;
        }

        public void AskToStop(string name) => Asked.Add(name);

        public void End(string name) => EndedByUs.Add(name);

        public void Probe(MachineSpec spec) => Probed.Add(spec.Name);

        public void SaveIntent(string name, bool? wanted) => Intents[name] = wanted;
    }
}
