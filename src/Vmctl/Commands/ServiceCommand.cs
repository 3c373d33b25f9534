// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.CommandLine;
using System.IO;
using System.Security;
using Vmm.Config;

namespace Vmctl.Commands;

/// <summary><c>vmctl service export</c>: what rc.d, SMF or systemd need to start one VM, or the daemon, at boot.</summary>
internal static class ServiceCommand
{
    internal static Command Create(CommandContext context)
    {
        var file = new Argument<string>("file")
        {
            Description = "Definition of one VM; without it, the service of the daemon.",
            Arity = ArgumentArity.ZeroOrOne,
        };
        var rcd = new Option<bool>("--rcd") { Description = "An rc.d script (FreeBSD)." };
        var smf = new Option<bool>("--smf") { Description = "An SMF manifest (illumos)." };
        var systemd = new Option<bool>("--systemd") { Description = "A systemd unit (Linux)." };
        var program = new Option<string>("--program") { Description = "Path of vmctl in the service.", HelpName = "path" };
        var export = new Command("export", "Write a service to standard output.") { file, rcd, smf, systemd, program };
        export.SetAction(result =>
        {
            MachineSpec? spec = result.GetValue(file) is { } path ? ConfigFiles.LoadNamed(path) : null;
            string source = result.GetValue(file) is { } given ? Path.GetFullPath(given) : string.Empty;
            string vmctl = result.GetValue(program) ?? Environment.ProcessPath ?? "/usr/local/bin/vmctl";
            context.Output.Write((result.GetValue(rcd), result.GetValue(smf), result.GetValue(systemd)) switch
            {
                (true, false, false) => RcScript(spec, source, vmctl),
                (false, true, false) => SmfManifest(spec, source, vmctl),
                (false, false, true) => SystemdUnit(spec, source, vmctl),
                _ => throw new CommandException(ExitStatus.Usage, "service export: choose one of --rcd, --smf and --systemd"),
            });
            return ExitStatus.Ok;
        });
        return new Command("service", "Have the system's own service manager start VMs.") { export };
    }

    // The daemon's services are the files that the packages in ports/ install.
    private static string Resource(string name)
    {
        using Stream stream = typeof(ServiceCommand).Assembly.GetManifestResourceStream(name)
            ?? throw new InvalidOperationException($"{name} was not built in");
        using var reader = new StreamReader(stream);
        return reader.ReadToEnd();
    }

    private static string Shell(string text) => "'" + text.Replace("'", "'\\''", StringComparison.Ordinal) + "'";

    // rc.conf variables are shell names.
    private static string Variable(string name)
    {
        return string.Create(name.Length, name, static (span, source) =>
        {
            for (int i = 0; i < span.Length; i++)
            {
                span[i] = char.IsAsciiLetterOrDigit(source[i]) ? source[i] : '_';
            }
        });
    }

    private static string RcScript(MachineSpec? spec, string file, string vmctl)
    {
        if (spec is null)
        {
            return Resource("vmm.rc").Replace("%%PREFIX%%/bin/vmctl", vmctl, StringComparison.Ordinal)
                .Replace("%%PREFIX%%", "/usr/local", StringComparison.Ordinal);
        }

        string variable = Variable("vmm_" + spec.Name);
        return $"""
            #!/bin/sh
            #
            # PROVIDE: {variable}
            # REQUIRE: DAEMON NETWORKING FILESYSTEMS{string.Concat(Array.ConvertAll([.. spec.After], name => " " + Variable("vmm_" + name)))}
            # KEYWORD: shutdown
            #
            # {variable}_enable="YES" starts the VM {spec.Name} at boot.

            . /etc/rc.subr

            name="{variable}"
            rcvar="{variable}_enable"
            load_rc_config "$name"
            : "${"{"}{variable}_enable:=NO{"}"}"

            pidfile="/var/run/${"{"}name{"}"}.pid"
            command="/usr/sbin/daemon"
            command_args="-c -f -P ${"{"}pidfile{"}"} -o /var/log/${"{"}name{"}"}.log {vmctl} run {Shell(file)}"
            stop_cmd="${"{"}name{"}"}_stop"

            {variable}_stop()
            {"{"}
                {vmctl} stop -t {Quantity.FormatDuration(spec.StopTimeout)} {spec.Name} || {vmctl} stop -f {spec.Name}
            {"}"}

            run_rc_command "$1"

            """;
    }

    private static string SystemdUnit(MachineSpec? spec, string file, string vmctl)
    {
        if (spec is null)
        {
            return Resource("vmctl.service").Replace("/usr/bin/vmctl", vmctl, StringComparison.Ordinal);
        }

        string after = string.Concat(Array.ConvertAll([.. spec.After], name => $" vmm-{name}.service"));
        string requires = string.Concat(Array.ConvertAll([.. spec.Requires], name => $" vmm-{name}.service"));
        return $"""
            [Unit]
            Description=Virtual machine {spec.Name}
            Documentation=man:vmctl(8)
            After=network.target local-fs.target{after}{requires}
            {(requires.Length == 0 ? string.Empty : "Requires=" + requires.TrimStart() + "\n")}
            [Service]
            ExecStart={vmctl} run "{file.Replace("%", "%%", StringComparison.Ordinal)}"
            ExecStop={vmctl} stop -t {Quantity.FormatDuration(spec.StopTimeout)} {spec.Name}
            # 1 power-off and 2 halt are orderly ends; 0 is a reset and wants a new start.
            SuccessExitStatus=1 2
            Restart={(spec.Restart.Policy switch { RestartPolicy.Always => "always", RestartPolicy.Never => "no", _ => "on-failure" })}
            RestartForceExitStatus={(spec.Restart.Policy == RestartPolicy.Never ? string.Empty : "0")}
            RestartSec={Quantity.FormatDuration(spec.Restart.Backoff)}
            TimeoutStopSec={Quantity.FormatDuration(spec.StopTimeout + TimeSpan.FromSeconds(10))}
            {(spec.RunAs is { } user ? "User=" + user + "\n" : string.Empty)}
            [Install]
            WantedBy=multi-user.target

            """;
    }

    private static string SmfManifest(MachineSpec? spec, string file, string vmctl)
    {
        string instance = spec?.Name ?? "default";
        string service = spec is null ? "site/vmm" : "site/vm";
        string start = SecurityElement.Escape(spec is null ? $"{vmctl} daemon --stop-on-exit &" : $"{vmctl} run {Shell(file)} </dev/null &")!;
        string stop = SecurityElement.Escape(spec is null ? ":kill" : $"{vmctl} stop {spec.Name} || {vmctl} stop -f {spec.Name}")!;
        long limit = (long)(spec?.StopTimeout ?? TimeSpan.FromMinutes(3)).TotalSeconds + 30;
        string dependencies = string.Concat(Array.ConvertAll([.. spec?.After ?? []], name => $"""
                  <dependency name='after-{name}' grouping='optional_all' restart_on='none' type='service'>
                    <service_fmri value='svc:/site/vm:{name}'/>
                  </dependency>

            """));
        return $"""
            <?xml version='1.0'?>
            <!DOCTYPE service_bundle SYSTEM '/usr/share/lib/xml/dtd/service_bundle.dtd.1'>
            <service_bundle type='manifest' name='vmctl:{instance}'>
              <service name='{service}' type='service' version='1'>
                <dependency name='multi-user' grouping='require_all' restart_on='none' type='service'>
                  <service_fmri value='svc:/milestone/multi-user'/>
                </dependency>
                <dependency name='filesystem' grouping='require_all' restart_on='error' type='service'>
                  <service_fmri value='svc:/system/filesystem/local'/>
                </dependency>
                <instance name='{instance}' enabled='false'>
            {dependencies}      <exec_method type='method' name='start' exec='{start}' timeout_seconds='60'/>
                  <exec_method type='method' name='stop' exec='{stop}' timeout_seconds='{limit}'/>
                  <property_group name='startd' type='framework'>
                    <propval name='duration' type='astring' value='contract'/>
                    <propval name='ignore_error' type='astring' value='core,signal'/>
                  </property_group>
                </instance>
                <stability value='Unstable'/>
                <template>
                  <common_name>
                    <loctext xml:lang='C'>{(spec is null ? "virtual machines of vmctl" : $"virtual machine {spec.Name}")}</loctext>
                  </common_name>
                  <documentation>
                    <manpage title='vmctl' section='8'/>
                  </documentation>
                </template>
              </service>
            </service_bundle>

            """;
    }
}
