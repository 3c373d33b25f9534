// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using FluentAssertions;
using Xunit;

namespace Vmm.Host.Tests;

/// <summary>
/// The set-up of an illumos VNIC against a provider that keeps to dlpi(4P): states, primitives, their sizes and offsets.
/// </summary>
public sealed class DlpiLinkTests
{
    [Fact]
    public void SetUp_OfAProvider_BindsReceivesEverythingAndReadsFrames()
    {
        var provider = new Provider();
        DlpiLink.SetUp(provider, "vnic vnic0");
        provider.IsBound.Should().BeTrue();
        provider.Levels.Should().Equal([2u, 3u, 4u], "all types, groups, not our own");
        provider.Requests.Should().Equal(0x4401);
        provider.ReadOptions.Should().Be(1 | 8, "RMSGD and RPROTDIS");
        provider.Unread.Should().Be(0, "every acknowledgement was taken");
    }

    [Fact]
    public void SetUp_FramesBetweenAcknowledgements_AreSkipped()
    {
        var provider = new Provider { FramesBeforeAcks = 3 };
        DlpiLink.SetUp(provider, "vnic vnic0");
        provider.Levels.Should().HaveCount(3);
    }

    [Theory]
    [InlineData(0x01u, "vnic vnic0: bind")]
    [InlineData(0x1Fu, "vnic vnic0: receive all types, level 2")]
    public void SetUp_ProviderRefuses_SaysWhatInOneLine(uint primitive, string beginning)
    {
        Action refused = () => DlpiLink.SetUp(new Provider { Refuses = primitive, Error = 2 }, "vnic vnic0");
        refused.Should().Throw<HostException>().Which.Message.Should().StartWith(beginning).And.Contain("DLPI's error 2");
        Action failed = () => DlpiLink.SetUp(new Provider { Refuses = primitive, Error = 4, SystemError = 13 }, "vnic vnic0");
        failed.Should().Throw<HostException>().Which.RawErrno.Should().Be(13, "DL_SYSERR carries the system's number");
    }

    [Fact]
    public void SetUp_ProviderNeverAnswers_Ends()
    {
        Action silent = () => DlpiLink.SetUp(new Provider { FramesBeforeAcks = int.MaxValue }, "vnic vnic0");
        silent.Should().Throw<HostException>().WithMessage("*does not answer*");
    }

    [Fact]
    public void SetUp_RawModeRefused_SaysSo()
    {
        Action refused = () => DlpiLink.SetUp(new Provider { RequestError = 22 }, "vnic vnic0");
        refused.Should().Throw<HostException>().WithMessage("vnic vnic0: raw mode*");
    }

    private sealed class Provider : IStreams
    {
        private readonly Queue<byte[]> _messages = new();
        private int _frames;

        public int FramesBeforeAcks { get; init; }

        public uint Refuses { get; init; }

        public uint Error { get; init; }

        public int SystemError { get; init; }

        public int RequestError { get; init; }

        public bool IsBound { get; private set; }

        public List<uint> Levels { get; } = [];

        public List<int> Requests { get; } = [];

        public int ReadOptions { get; private set; }

        public int Unread => _messages.Count;

        public int Put(ReadOnlySpan<byte> control)
        {
            uint primitive = BinaryPrimitives.ReadUInt32LittleEndian(control);
            _frames = FramesBeforeAcks;
            if (primitive == Refuses)
            {
                Answer(0x05, primitive, Error, (uint)SystemError); // dl_error_ack_t
                return 0;
            }

            switch (primitive)
            {
                case 0x01:
                    control.Length.Should().Be(20, "dl_bind_req_t");
                    BinaryPrimitives.ReadUInt16LittleEndian(control[12..]).Should().Be(2, "dl_service_mode is DL_CLDLS");
                    BinaryPrimitives.ReadUInt16LittleEndian(control[14..]).Should().Be(0, "no connection management");
                    IsBound = true;
                    Answer(0x04, 0, 6, 28, 0, 0, 0); // dl_bind_ack_t
                    break;
                case 0x1F:
                    control.Length.Should().Be(8, "dl_promiscon_req_t");
                    IsBound.Should().BeTrue("the stream has to be idle");
                    Levels.Add(BinaryPrimitives.ReadUInt32LittleEndian(control[4..]));
                    Answer(0x06, 0x1F); // dl_ok_ack_t
                    break;
                default:
                    Answer(0x05, primitive, 7, 0); // DL_UNSUPPORTED
                    break;
            }

            return 0;
        }

        public int Get(Span<byte> control, out int length)
        {
            length = 0;
            if (_frames > 0)
            {
                _frames--;
                return 0;
            }

            if (!_messages.TryDequeue(out byte[]? message))
            {
                throw new InvalidOperationException("this would wait for ever");
            }

            message.CopyTo(control);
            length = message.Length;
            return 0;
        }

        public int Request(int command)
        {
            Requests.Add(command);
            return RequestError;
        }

        public int SetReadOptions(int options)
        {
            ReadOptions = options;
            return 0;
        }

        private void Answer(params uint[] words)
        {
            byte[] message = new byte[words.Length * 4];
            for (int i = 0; i < words.Length; i++)
            {
                BinaryPrimitives.WriteUInt32LittleEndian(message.AsSpan(i * 4), words[i]);
            }

            _messages.Enqueue(message);
        }
    }
}
