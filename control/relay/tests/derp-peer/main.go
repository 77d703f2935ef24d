// derp-peer is the foreign party of our tests: Tailscale's own DERP and STUN clients, unmodified, at
// the version that go.mod pins.
//
//	derp-peer check [-ca FILE] [-stun ADDRESS] URL   exchanges packets through a relay, says what holds
//	derp-peer echo [-ca FILE] URL                    prints its public key, sends every packet back
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/netmon"
	"tailscale.com/net/stun"
	"tailscale.com/types/key"
)

const limit = 10 * time.Second

var roots *x509.CertPool

func main() {
	flags := flag.NewFlagSet("derp-peer", flag.ExitOnError)
	ca := flags.String("ca", "", "PEM file of the certificate to trust")
	stunAddress := flags.String("stun", "", "STUN server to ask")
	if len(os.Args) < 3 {
		die("usage: derp-peer check|echo [-ca FILE] [-stun ADDRESS] URL")
	}
	flags.Parse(os.Args[2:])
	if *ca != "" {
		pem, err := os.ReadFile(*ca)
		must(err, "reading the certificate")
		roots = x509.NewCertPool()
		if !roots.AppendCertsFromPEM(pem) {
			die("no certificate in %s", *ca)
		}
	}
	url := flags.Arg(0)
	switch os.Args[1] {
	case "check":
		check(url)
		if *stunAddress != "" {
			askStun(*stunAddress)
		}
		fmt.Println("all ok")
	case "echo":
		echo(url)
	default:
		die("check or echo, not %s", os.Args[1])
	}
}

func connect(url string) *derphttp.Client {
	quiet := func(string, ...any) {}
	client, err := derphttp.NewClient(key.NewNode(), url, quiet, netmon.NewStatic())
	must(err, "making a client")
	if roots != nil {
		client.TLSConfig = &tls.Config{RootCAs: roots}
	}
	client.SetCanAckPings(true)
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	must(client.Connect(ctx), "connecting to "+url)
	// The first message is the server's info: with it the relay has proven its key.
	receive[derp.ServerInfoMessage](client, "the server's info")
	return client
}

// receive waits for a message of one type; others before it are skipped.
func receive[M derp.ReceivedMessage](client *derphttp.Client, what string) M {
	timer := time.AfterFunc(limit, func() { die("waited %v for %s", limit, what) })
	defer timer.Stop()
	for {
		message, err := client.Recv()
		must(err, "receiving "+what)
		if found, ok := message.(M); ok {
			return found
		}
	}
}

func check(url string) {
	a, b := connect(url), connect(url)
	ok("two clients logged in")
	for _, size := range []int{0, 1, 148, 1280, 1420, 9000, derp.MaxPacketSize} {
		for _, pair := range [][2]*derphttp.Client{{a, b}, {b, a}} {
			packet := make([]byte, size)
			rand.Read(packet)
			must(pair[0].Send(pair[1].SelfPublicKey(), packet), "sending")
			got := receive[derp.ReceivedPacket](pair[1], "a packet")
			if got.Source != pair[0].SelfPublicKey() || !bytes.Equal(got.Data, packet) {
				die("a packet of %d bytes arrived changed", size)
			}
		}
	}
	ok("packets of all sizes pass both ways unchanged")
	burst(a, b)
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	go func() {
		for {
			if _, err := a.Recv(); err != nil {
				return
			}
		}
	}()
	must(a.Ping(ctx), "pinging the relay")
	ok("ping is answered")
	a.NotePreferred(true)
	stranger := key.NewNode().Public()
	disco := append([]byte("TS\xf0\x9f\x92\xac"), make([]byte, 60)...)
	must(b.Send(stranger, disco), "sending to a stranger")
	gone := receive[derp.PeerGoneMessage](b, "PeerGone")
	if gone.Peer != stranger || gone.Reason != derp.PeerGoneReasonNotHere {
		die("PeerGone of %v for %v", gone.Peer, gone.Reason)
	}
	ok("a stranger is not here")
	aKey := a.SelfPublicKey()
	a.Close()
	gone = receive[derp.PeerGoneMessage](b, "PeerGone")
	if gone.Peer != aKey || gone.Reason != derp.PeerGoneReasonDisconnected {
		die("PeerGone of %v for %v", gone.Peer, gone.Reason)
	}
	ok("a peer that left is gone")
	b.Close()
	get(url)
}

// burst sends more than one write's worth at once: order and content must hold.
func burst(a, b *derphttp.Client) {
	const packets = 30
	go func() {
		for i := range packets {
			packet := bytes.Repeat([]byte{byte(i)}, 1000+i)
			must(a.Send(b.SelfPublicKey(), packet), "sending")
		}
	}()
	for i := range packets {
		got := receive[derp.ReceivedPacket](b, "a packet of the burst")
		if !bytes.Equal(got.Data, bytes.Repeat([]byte{byte(i)}, 1000+i)) {
			die("packet %d of the burst is not the one sent", i)
		}
	}
	ok("a burst arrives in order")
}

// get asks what netcheck and the captive portal detection ask.
func get(url string) {
	base := strings.TrimSuffix(url, "/derp")
	client := http.Client{
		Timeout:   limit,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}},
	}
	for _, path := range []string{"/derp/probe", "/derp/latency-check"} {
		answer, err := client.Get(base + path)
		must(err, path)
		answer.Body.Close()
		if answer.StatusCode != 200 || answer.Header.Get("Access-Control-Allow-Origin") != "*" {
			die("%s: %s", path, answer.Status)
		}
	}
	request, err := http.NewRequest("GET", base+"/generate_204", nil)
	must(err, "a request")
	request.Header.Set("X-Tailscale-Challenge", "ts_host.example")
	answer, err := client.Do(request)
	must(err, "/generate_204")
	answer.Body.Close()
	if answer.StatusCode != 204 || answer.Header.Get("X-Tailscale-Response") != "response ts_host.example" {
		die("/generate_204: %s %v", answer.Status, answer.Header)
	}
	ok("probes and the captive portal check are answered")
}

func askStun(address string) {
	connection, err := net.Dial("udp", address)
	must(err, "a UDP socket")
	transaction := stun.NewTxID()
	request := stun.Request(transaction)
	if len(request) != 40 {
		die("a STUN request of %d bytes", len(request))
	}
	_, err = connection.Write(request)
	must(err, "sending a STUN request")
	connection.SetReadDeadline(time.Now().Add(limit))
	answer := make([]byte, 1500)
	n, err := connection.Read(answer)
	must(err, "waiting for a STUN answer")
	got, seen, err := stun.ParseResponse(answer[:n])
	must(err, "reading the STUN answer")
	if got != transaction || seen.String() != connection.LocalAddr().String() {
		die("STUN says %v, we are %v", seen, connection.LocalAddr())
	}
	ok("STUN answers the 40-byte request")
}

func echo(url string) {
	client := connect(url)
	fmt.Println("key", client.SelfPublicKey().UntypedHexString())
	for {
		message, err := client.Recv()
		must(err, "receiving")
		switch message := message.(type) {
		case derp.ReceivedPacket:
			must(client.Send(message.Source, message.Data), "sending back")
		case derp.ServerRestartingMessage:
			fmt.Println("restarting", message.ReconnectIn < time.Second, message.TryFor)
		case derp.HealthMessage:
			fmt.Println("health", message.Problem)
		}
	}
}

func ok(what string) { fmt.Println("ok:", what) }

func must(err error, doing string) {
	if err != nil {
		die("%s: %v", doing, err)
	}
}

func die(format string, args ...any) {
	fmt.Printf("FAILED: "+format+"\n", args...)
	os.Exit(1)
}
